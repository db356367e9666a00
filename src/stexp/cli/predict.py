"""``stexp-predict run=model.stexp slide=slide.svs``: the expression on slides that have only H&E."""

from __future__ import annotations

import glob
import json
import logging
import shutil
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from stexp.cli.analyse import analyse, check, wanted
from stexp.config import alone_in, command, to_plain, write_atomically
from stexp.config.compose import entry
from stexp.data.slides import pictures as report_pictures
from stexp.errors import InputError
from stexp.evaluation import predictions
from stexp.reporting.report import write_report

log = logging.getLogger(__name__)

SUFFIXES = frozenset(
    [
        ".svs",
        ".ndpi",
        ".mrxs",
        ".scn",
        ".vms",
        ".vmu",
        ".bif",
        ".tif",
        ".tiff",
        ".svslide",
        ".jpg",
        ".jpeg",
        ".png",
        ".jp2",
    ]
)
"""What is taken for a slide in a folder."""

SETTINGS = ("um_per_px", "grid", "spacing_um", "coordinates", "genes")
"""Keys that a prediction depends on."""


@entry("predict")
def main(cfg: DictConfig) -> None:
    with command():
        for key, example in (("run", "runs/x or a model of stexp-export"), ("slide", "an image or a folder of them")):
            if OmegaConf.is_missing(cfg, key):
                raise InputError(f"{key} is not given: {key}= names {example}")
        plain = to_plain(cfg)
        plain["coordinates"] = None if cfg.coordinates is None else str(cfg.coordinates)
        check(plain)
        slides = find_slides(plain["slide"])
        if cfg.coordinates is not None and len(slides) > 1:
            raise InputError(f"coordinates are of one slide, and slide= names {len(slides)}")
        predict(plain, slides)


def predict(cfg: dict, slides: dict[str, Path]) -> list[Path]:
    """Predict slides into ``<output_dir>/<name>``; those that fail do not stop the rest.

    Parameters
    ----------
    cfg
        ``conf/predict.yaml`` as plain data.
    slides
        Name -> image, see `find_slides`.

    Returns
    -------
    list of Path
        The folders.

    Raises
    ------
    InputError
        After all others are done: which slides failed, and why.
    """
    from stexp.inference.predictor import load_model

    model = load_model(cfg["run"])
    log.info("%r", model)
    done, failed = [], {}
    for number, (name, path) in enumerate(slides.items(), start=1):
        log.info("slide %s (%d of %d)", name, number, len(slides))
        try:
            done.append(_predict(model, cfg, path, Path(cfg["output_dir"]) / name))
            print(f"wrote {done[-1]}")
            if wanted(cfg):
                print("\n".join(analyse(done[-1], cfg)))
        except (InputError, OSError, MemoryError) as error:
            failed[name] = " ".join(str(error).split()) or type(error).__name__
            log.error("slide %s: %s", name, failed[name])
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise InputError(reasons if len(slides) == 1 else f"{len(failed)} of {len(slides)} slides failed: {reasons}")
    return done


def _predict(model, cfg: dict, path: Path, folder: Path) -> Path:
    with alone_in(folder):
        return _predict_alone(model, cfg, path, folder)


def _predict_alone(model, cfg: dict, path: Path, folder: Path) -> Path:
    from stexp.data.slides.tiles import file_digest

    given = cfg["coordinates"]
    settings = {
        **{key: cfg[key] for key in SETTINGS},
        "coordinates": given and file_digest(given) if given is None or Path(given).is_file() else str(given),
        "model": model.facts["digest"],
        "slide": file_digest(path),
    }
    record = folder / "provenance.json"
    if record.is_file() and (folder / "predictions.h5ad").is_file() and not cfg["overwrite"]:
        before = predictions.read_json(record, "settings")["settings"]
        differing = sorted(key for key in settings if before.get(key) != settings[key])
        if differing:
            raise InputError(
                f"{folder} holds a prediction with another {', '.join(differing)}; choose another output_dir, or "
                f"overwrite=true"
            )
        log.info("%s is finished; give overwrite=true to predict it again", folder)
        if not (folder / "report.html").is_file():
            write_report(folder)
        return folder
    began, work = time.perf_counter(), folder / ".work"
    for old in (record, folder / "report.html"):  # the first says that the prediction beside it is finished
        old.unlink(missing_ok=True)
    keys = ("um_per_px", "grid", "spacing_um", "coordinates", "genes", "device", "batch_size")
    adata = model.predict(path, **{key: cfg[key] for key in keys}, work_dir=work)
    predictions.write(adata, folder / "predictions.h5ad")
    _write_pictures(model, adata, path, folder / report_pictures.NAME)
    write_atomically(record, json.dumps(_provenance(model, adata, settings, path, began), indent=1))
    write_report(folder)
    shutil.rmtree(work)
    print(f"{path.name}: {adata.uns['stexp']['verdict']}")
    return folder


def _write_pictures(model, adata, path: Path, pictures: Path) -> None:
    from stexp.data.slides.slide import Slide

    side = float(adata.uns["stexp"]["tile_side_px"])
    # a report drops what is too much beside the expression
    slide = report_pictures.picture(Slide(path), adata.obsm["spatial"], side, 2 * report_pictures.SLIDE_BYTES)
    tiles = model.reference_tiles
    if tiles is not None and "neighbours" in adata.obsm:
        tiles = tiles.among(predictions.heaviest_references(adata))
    report_pictures.write(pictures, {str(adata.obs["section"].iloc[0]): slide}, tiles)


def _provenance(model, adata, settings: dict, path: Path, began: float) -> dict:
    from stexp import hardware
    from stexp.runs.provenance import command_line, git_state, now, versions

    facts = adata.uns["stexp"]
    return {
        "command": command_line(),
        **git_state(),
        "date": now(),
        "seconds": round(time.perf_counter() - began, 1),
        **hardware.peak_memory(),
        "hardware": hardware.describe(),
        "precision": facts["precision"],
        "verdict": facts["verdict"],
        "versions": versions(),
        "settings": settings,
        "slide": path.name,
        "model": {key: model.facts[key] for key in ("method", "data", "fold", "trained", "licences", "digest")},
        "n_spots": adata.n_obs,
        "n_genes": adata.n_vars,
    }


def find_slides(given: str | list[str]) -> dict[str, Path]:
    """Images by name, from a path, a folder, a pattern or a list of these.

    Raises
    ------
    InputError
        Nothing there, or two images of one name.
    """
    slides: dict[str, Path] = {}
    items = given if isinstance(given, list) else [given]
    if not items:
        raise InputError("slide=[] names no slide")
    for item in items:
        item = Path(str(item))
        if item.is_dir():
            found = sorted(path for path in item.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
        else:
            found = [item] if item.exists() else sorted(Path(path) for path in glob.glob(str(item)))
        if not found:
            raise InputError(f"slide={item}: there is no image; name one, a folder of them, or a pattern in quotes")
        for path in found:
            name = path.stem.removesuffix(".ome")
            if slides.setdefault(name, path) != path:
                raise InputError(f"slides {slides[name]} and {path} have one name; predict them into two output_dir")
    return slides


if __name__ == "__main__":
    main()
