"""Slides that have only H&E, found, predicted and put on record: what ``stexp-predict`` does."""

from __future__ import annotations

import glob
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anndata as ad

from stexp import hardware
from stexp.arguments import Count, Positive, check
from stexp.data.digests import file_digest
from stexp.data.slides import pictures as report_pictures
from stexp.data.slides.formats import SUFFIXES, is_litter, slide_files, slide_name
from stexp.data.slides.ome_zarr import is_zarr
from stexp.data.slides.slide import Slide
from stexp.errors import InputError, in_one_line
from stexp.evaluation import predictions
from stexp.evaluation.records import SlideProvenance, read_json
from stexp.files import alone_in, write_atomically
from stexp.reporting.downstream import analyse, wanted
from stexp.reporting.downstream import check as exports_and_analyses
from stexp.reporting.index_page import write_index
from stexp.reporting.report import write_report

if TYPE_CHECKING:
    from stexp.inference.predictor import Model  # brings torch

log = logging.getLogger(__name__)

SETTINGS = {
    "um_per_px": None,
    "grid": "hexagonal",
    "spacing_um": 100,
    "coordinates": None,
    "genes": "panel",
    "exclude_slide": False,
}
"""Keys that a prediction depends on -> their value in the record of a prediction that is older than the key."""
COMPUTED_WITH = ("device", "batch_size")
SHEETS = (".csv", ".tsv")
"""Endings of what is taken for a sheet of slides, see :func:`stexp.inference.slide_sheet.read_slide_sheet`."""


def slides_of(slide: str | list[str]) -> tuple[dict[str, Path], dict[str, float]]:
    """Images by name, from all that `find_slides` takes or a sheet; and the scale of those whose sheet says it."""
    sheet = Path(os.path.expanduser(str(slide)))
    if isinstance(slide, list) or sheet.suffix.lower() not in SHEETS:
        return find_slides(slide), {}
    from stexp.inference.slide_sheet import read_slide_sheet  # brings torch

    rows = read_slide_sheet(sheet)
    slides = {name: path for name, (path, _) in rows.items()}
    return slides, {name: um for name, (_, um) in rows.items() if um is not None}


def check_settings(cfg: dict) -> None:
    """InputError for keys that fit no model and no slide, before either is read."""
    exports_and_analyses(cfg)
    if cfg["um_per_px"] is not None and not _is_positive(cfg["um_per_px"]):
        raise InputError(f"um_per_px={cfg['um_per_px']}: a number above 0 (0.5 for 20x, 0.25 for 40x) would fit")
    if cfg["coordinates"] is None:
        check("grid", cfg["grid"], Literal["hexagonal", "square"])
        check("spacing_um", cfg["spacing_um"], Positive)
    elif not Path(cfg["coordinates"]).is_file():
        raise InputError(f"coordinates {cfg['coordinates']} do not exist")
    check("batch_size", cfg["batch_size"], Count)
    hardware.accelerator_of(str(cfg["device"]).partition(":")[0], "device")
    output = Path(cfg["output_dir"]).expanduser()
    if output.exists() and not output.is_dir():
        raise InputError(f"output_dir={output} is a file; name a folder")


def predict(cfg: dict, slides: dict[str, Path], scales: Mapping[str, float] | None = None) -> list[Path]:
    """Predict slides into ``<output_dir>/<name>``; those that fail do not stop the rest.

    Parameters
    ----------
    cfg
        ``conf/predict.yaml`` as plain data.
    slides
        Name -> image, see `slides_of`.
    scales
        Name -> micrometres per pixel, of slides that have another than ``um_per_px``.

    Returns
    -------
    list of Path
        The folders.

    Raises
    ------
    InputError
        After all others are done: which slides failed, and why.
    """
    output, done, failed = Path(cfg["output_dir"]).expanduser(), [], {}
    asked = {name: {**cfg, "um_per_px": (scales or {}).get(name, cfg["um_per_px"])} for name in slides}

    @contextmanager
    def noted(name: str) -> Iterator[None]:
        try:
            yield
        except (InputError, OSError, MemoryError) as error:
            failed[name] = in_one_line(error)
            log.error("slide %s: %s", name, failed[name])

    for name, path in slides.items():
        with noted(name):  # before a model is loaded
            _check_earlier(output / name, asked[name], path)
    if len(failed) < len(slides):
        model = _load(cfg)
        for number, (name, path) in enumerate(slides.items(), start=1):
            if name in failed:
                continue
            log.info("slide %s (%d of %d)", name, number, len(slides))
            with noted(name):
                done.append(_predict(model, asked[name], path, output / name))
                print(f"wrote {done[-1]}")
                if wanted(cfg):
                    print("\n".join(analyse(done[-1], cfg)))
    # of a slide that was predicted before, with other settings, the prediction stands
    lacking = {name: why for name, why in failed.items() if not (output / name / "provenance.json").is_file()}
    for written in write_index(output, lacking):
        print(f"wrote {written}")
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise InputError(reasons if len(slides) == 1 else f"{len(failed)} of {len(slides)} slides failed: {reasons}")
    return done


def _predict(model: Model, cfg: dict, path: Path, folder: Path) -> Path:
    held = False
    try:
        with alone_in(folder):
            held = True
            settings = _settings(cfg, path) | {"model": model.facts["digest"]}
            if not _is_finished(folder, settings, cfg["overwrite"]):
                _predict_alone(model, cfg, path, folder, settings)
            return folder
    except BaseException:
        if held:
            _remove_if_empty(folder)
        raise


def _load(cfg: dict) -> Model:
    """The model; its genes are judged before its weights are loaded."""
    # these bring torch
    from stexp.inference.gene_choice import check_genes
    from stexp.inference.predictor import exported_folder, load_model
    from stexp.training.machine import take_free_threads

    take_free_threads()
    folder = exported_folder(cfg["run"])
    check_genes(folder, cfg["genes"])
    model = load_model(folder)
    log.info("%r", model)
    return model


def _settings(cfg: dict, path: Path) -> dict:
    """What tells one prediction of a slide by a model from another."""
    coordinates = cfg["coordinates"]
    if coordinates is not None and Path(coordinates).is_file():
        coordinates = file_digest(coordinates)
    settings = {key: cfg.get(key, default) for key, default in SETTINGS.items()}
    return settings | {"coordinates": coordinates, "slide": file_digest(path)}


def _check_earlier(folder: Path, cfg: dict, path: Path) -> None:
    """InputError where a folder holds a prediction with other settings, whatever its model."""
    if _is_predicted(folder) and not cfg["overwrite"]:
        _compare(folder, _settings(cfg, path))


def _is_predicted(folder: Path) -> bool:
    return (folder / "provenance.json").is_file() and (folder / "predictions.h5ad").is_file()


def _compare(folder: Path, settings: dict) -> None:
    """InputError where the prediction in a folder was made with others of these settings."""
    before = SETTINGS | read_json(folder / "provenance.json", SlideProvenance)["settings"]
    differing = sorted(key for key in settings if before.get(key) != settings[key])
    if differing:
        raise InputError(
            f"{folder} holds a prediction with another {', '.join(differing)}; choose another output_dir, or "
            f"overwrite=true"
        )


def _is_finished(folder: Path, settings: dict, overwrite: bool) -> bool:
    """Whether a folder holds this prediction; what a kill left undone after its record is done.

    Raises
    ------
    InputError
        It holds another prediction, and `overwrite` is not given.
    """
    if overwrite or not _is_predicted(folder):
        return False
    _compare(folder, settings)
    log.info("%s is finished; give overwrite=true to predict it again", folder)
    if not (folder / "report.html").is_file():
        write_report(folder)
    shutil.rmtree(folder / ".work", ignore_errors=True)
    return True


def _predict_alone(model: Model, cfg: dict, path: Path, folder: Path, settings: dict) -> None:
    began, work, record = time.perf_counter(), folder / ".work", folder / "provenance.json"
    for old in (record, folder / "report.html"):  # the first says that the prediction beside it is finished
        old.unlink(missing_ok=True)
    options: dict[str, Any] = {key: cfg.get(key, default) for key, default in SETTINGS.items()}
    adata = model.predict(path, **options, **{key: cfg[key] for key in COMPUTED_WITH}, work_dir=work)
    predictions.write(adata, folder / "predictions.h5ad")
    _write_pictures(model, adata, path, folder / report_pictures.NAME)
    write_atomically(record, json.dumps(_provenance(model, adata, settings, path, began), indent=1))
    write_report(folder)
    shutil.rmtree(work, ignore_errors=True)
    print(f"{path.name}: {adata.uns['stexp']['verdict']}")


def _remove_if_empty(folder: Path) -> None:
    """Delete the folder of a slide in which nothing was made, and its parent where nothing else is in it."""
    work = folder / ".work"
    for empty in [*work.glob("*"), work]:
        if empty.is_dir() and not any(empty.iterdir()):
            empty.rmdir()
    if {path.name for path in folder.iterdir()} <= {".lock"}:
        (folder / ".lock").unlink(missing_ok=True)
        folder.rmdir()
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()


def _write_pictures(model: Model, adata: ad.AnnData, path: Path, pictures: Path) -> None:
    side = float(adata.uns["stexp"]["tile_side_px"])
    # a report drops what is too much beside the expression
    slide = report_pictures.picture(Slide(path), adata.obsm["spatial"], side, 2 * report_pictures.SLIDE_BYTES)
    tiles = model.reference_tiles
    if tiles is not None and "neighbours" in adata.obsm:
        tiles = tiles.among(predictions.heaviest_references(adata))
    report_pictures.write(pictures, {str(adata.obs["section"].iloc[0]): slide}, tiles)


def _provenance(model: Model, adata: ad.AnnData, settings: dict, path: Path, began: float) -> dict:
    from stexp.runs.provenance import command_line, git_state, now, versions  # brings torch

    about = adata.uns["stexp"]
    return {
        "command": command_line(),
        **git_state(),
        "date": now(),
        "seconds": round(time.perf_counter() - began, 1),
        **hardware.peak_memory(),
        "hardware": hardware.describe(),
        "precision": about["precision"],
        "verdict": about["verdict"],
        "versions": versions(),
        "settings": settings,
        "slide": path.name,
        "model": {key: model.facts[key] for key in ("method", "data", "fold", "trained", "licences", "digest")},
        "n_spots": adata.n_obs,
        "n_genes": adata.n_vars,
    }


def find_slides(slide: str | list[str]) -> dict[str, Path]:
    """Images by name, from a path, a folder, a pattern or a list of these; ``~`` is the home folder.

    Of a folder, and of a pattern that matches anything else too, files are taken that end like an image; hidden ones
    and what operating systems leave are not.

    Raises
    ------
    InputError
        Nothing there, or two images of one name.
    """
    slides: dict[str, Path] = {}
    items = slide if isinstance(slide, list) else [slide]
    if not items:
        raise InputError("slide=[] names no slide")
    for item in items:
        place = Path(os.path.expanduser(str(item)))
        if place.is_dir() and not is_zarr(place):
            paths = slide_files(place)
        elif place.exists():
            paths = [place]
        else:
            matches = [Path(path) for path in glob.glob(str(place))]
            matches = sorted(path for path in matches if path.is_file() and not is_litter(path))
            paths = [path for path in matches if path.suffix.lower() in SUFFIXES] or matches
        if not paths:
            absent = "there is no such file or folder" if not place.exists() else "there is no image"
            raise InputError(
                f"slide={item}: {absent}; name one, a folder of them, or a pattern in quotes"
                + (f"; images end with {', '.join(sorted(SUFFIXES))}" if place.is_dir() else "")
            )
        for path in paths:
            name = slide_name(path)
            if slides.setdefault(name, path) != path:
                raise InputError(f"slides {slides[name]} and {path} have one name; predict them into two output_dir")
    return slides


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
