"""``stexp-predict run=model.stexp slide=slide.svs``: the expression on slides that have only H&E."""

from __future__ import annotations

import glob
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
from omegaconf import DictConfig, OmegaConf

from stexp import hardware
from stexp.cli.analyse import analyse, check, wanted
from stexp.config import command, to_plain
from stexp.config.compose import entry
from stexp.data.digests import file_digest
from stexp.data.slides import pictures as report_pictures
from stexp.data.slides.formats import SUFFIXES, is_litter, slide_files, slide_name
from stexp.data.slides.ome_zarr import is_zarr
from stexp.data.slides.slide import Slide
from stexp.errors import InputError, in_one_line
from stexp.evaluation import predictions
from stexp.files import alone_in, write_atomically
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


@entry("predict")
def main(cfg: DictConfig) -> None:
    with command():
        for key, example in (("run", "runs/x or a model of stexp-export"), ("slide", "an image or a folder of them")):
            if OmegaConf.is_missing(cfg, key):
                raise InputError(f"{key} is not given: {key}= names {example}")
        plain = to_plain(cfg)
        plain["coordinates"] = None if cfg.coordinates is None else str(cfg.coordinates)
        check(plain)
        slides, scales = slides_of(plain["slide"])
        if cfg.coordinates is not None and len(slides) > 1:
            raise InputError(f"coordinates are of one slide, and slide= names {len(slides)}")
        predict(plain, slides, scales)


def slides_of(slide: str | list[str]) -> tuple[dict[str, Path], dict[str, float]]:
    """Images by name, from all that `find_slides` takes or a sheet; and the scale of those whose sheet says it."""
    sheet = Path(os.path.expanduser(str(slide)))
    if isinstance(slide, list) or sheet.suffix.lower() not in SHEETS:
        return find_slides(slide), {}
    from stexp.inference.slide_sheet import read_slide_sheet  # brings torch

    rows = read_slide_sheet(sheet)
    slides = {name: path for name, (path, _) in rows.items()}
    return slides, {name: um for name, (_, um) in rows.items() if um is not None}


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
    from stexp.inference.predictor import load_model  # brings torch, which help does without

    model = load_model(cfg["run"])
    log.info("%r", model)
    done, failed = [], {}
    for number, (name, path) in enumerate(slides.items(), start=1):
        log.info("slide %s (%d of %d)", name, number, len(slides))
        own = {**cfg, "um_per_px": (scales or {}).get(name, cfg["um_per_px"])}
        try:
            done.append(_predict(model, own, path, Path(cfg["output_dir"]).expanduser() / name))
            print(f"wrote {done[-1]}")
            if wanted(cfg):
                print("\n".join(analyse(done[-1], cfg)))
        except (InputError, OSError, MemoryError) as error:
            failed[name] = in_one_line(error)
            log.error("slide %s: %s", name, failed[name])
    output = Path(cfg["output_dir"]).expanduser()
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
            settings = _settings(model, cfg, path)
            if not _is_finished(folder, settings, cfg["overwrite"]):
                _predict_alone(model, cfg, path, folder, settings)
            return folder
    except BaseException:
        if held:
            _remove_if_empty(folder)
        raise


def _settings(model: Model, cfg: dict, path: Path) -> dict:
    """What tells one prediction of a slide from another."""
    coordinates = cfg["coordinates"]
    if coordinates is not None and Path(coordinates).is_file():
        coordinates = file_digest(coordinates)
    settings = {key: cfg.get(key, default) for key, default in SETTINGS.items()}
    return settings | {"coordinates": coordinates, "model": model.facts["digest"], "slide": file_digest(path)}


def _is_finished(folder: Path, settings: dict, overwrite: bool) -> bool:
    """Whether a folder holds this prediction; what a kill left undone after its record is done.

    Raises
    ------
    InputError
        It holds another prediction, and `overwrite` is not given.
    """
    record = folder / "provenance.json"
    if overwrite or not (record.is_file() and (folder / "predictions.h5ad").is_file()):
        return False
    recorded = SETTINGS | predictions.read_json(record, "settings")["settings"]
    differing = sorted(key for key in settings if recorded.get(key) != settings[key])
    if differing:
        raise InputError(
            f"{folder} holds a prediction with another {', '.join(differing)}; choose another output_dir, or "
            f"overwrite=true"
        )
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
            raise InputError(
                f"slide={item}: there is no image; name one, a folder of them, or a pattern in quotes"
                + (f"; images end with {', '.join(sorted(SUFFIXES))}" if place.is_dir() else "")
            )
        for path in paths:
            name = slide_name(path)
            if slides.setdefault(name, path) != path:
                raise InputError(f"slides {slides[name]} and {path} have one name; predict them into two output_dir")
    return slides


if __name__ == "__main__":
    main()
