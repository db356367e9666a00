"""What a prediction from the image alone says of itself, held against the counts that were measured on the slide.

python experiments/predict_from_image.py runs/her2st-B --calibrate runs/her2st-C

The held-out sections of the first run are predicted from their images as if they had no counts, by the run as it is
exported. Intervals and the accuracy to expect of a gene come from the held-out sections of the runs under
--calibrate, other folds of the same method, never from the sections that are predicted. With two patients that means:
the model of one patient's sections predicts the other's, and is calibrated on what the other's model predicts of the
first's. Then the same slides are spoilt on purpose.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageFilter
from scipy.spatial import cKDTree
from scipy.stats import spearmanr

from stexp import hardware, load_model
from stexp.inference.expected import expected_accuracy
from stexp.inference.export import export
from stexp.inference.intervals import calibrate
from stexp.inference.predictor import Model
from stexp.runs.finished import Run
from stexp.runs.provenance import git_state, manifest, now, versions

GRID_UM, SPOILT_UM = 200.0, 400.0  # spacing of the grids: that of the arrays, and less dense to save time
BLUR_UM = 3.0
ABOUT = ("expected_pearson", "expected_floor", "expected_floor_name", "beats_floor", "n_held_out_sections")


def measure(model: Model, section, observed: np.ndarray, own: pd.DataFrame, folder: Path) -> dict:
    """One section: what is said from its image, and what its counts `observed` (n, G) say to that.

    Parameters
    ----------
    own
        Of the panel, Pearson and best floor on the section itself.
    """
    options = {"um_per_px": section.um_per_px, "progress": False}
    alone = model.predict(section.slide, spacing_um=GRID_UM, **options)
    at = model.predict(section.slide, coordinates=section.xy_px, **options)
    inside = np.where(
        np.isfinite(observed), (at.layers["lower"] <= observed) & (observed <= at.layers["upper"]), np.nan
    )
    strange = at.obs["out_of_distribution"].to_numpy(bool)
    error = np.nanmean(np.abs(observed - at.layers["predicted"]), axis=1)
    per_gene, per_spot = np.nanmean(inside, axis=0), np.nanmean(inside, axis=1)
    near = cKDTree(section.xy_px).query(alone.obsm["spatial"])[0] * section.um_per_px <= GRID_UM
    return {
        "spots": at.n_obs,
        "grid": {"spots": alone.n_obs, "near_measured_spots": _round(near.mean())},
        "verdict": str(alone.uns["stexp"]["verdict"]),
        "checks": json.loads(alone.uns["stexp"]["checks"]),
        "interval": {
            "coverage": _round(np.nanmean(inside)),
            "coverage_of_genes": _quantiles(per_gene),
            "coverage_by_expression": _by_third(per_gene, np.nanmean(observed, axis=0)),
            "median_halfwidth": _round(np.nanmedian(at.var["interval_halfwidth"])),
            "agrees_with_measured_before": _spearman(per_gene, at.var["coverage_measured"].to_numpy()),
        },
        "unlike_training": {
            "share": _round(strange.mean()),
            "spearman_with_error": _spearman(at.obs["ood_percentile"].to_numpy(), error),
            "error": {name: _round(error[where].mean()) for name, where in _split(strange)},
            "coverage": {name: _round(per_spot[where].mean()) for name, where in _split(strange)},
        },
        "genes": _flags(at.var, own),
        "spoilt": _spoilt(model, section, folder),
    }


def _flags(said: pd.DataFrame, own: pd.DataFrame) -> dict:
    """Whether genes that were said to beat their floor do so on the section."""
    own = own.loc[said.index]
    known = (said["expected_pearson"].notna() & own["expected_pearson"].notna()).to_numpy()
    found = {"compared": int(known.sum())}
    found["spearman_of_expected"] = _spearman(
        said["expected_pearson"].to_numpy()[known], own["expected_pearson"].to_numpy()[known]
    )
    for name, value in (("said_to_beat_its_floor", True), ("said_not_to", False)):
        here = known & (said["beats_floor"].to_numpy(bool) == value)
        found[name] = {
            "genes": int(here.sum()),
            "mean_pearson": _round(own["expected_pearson"][here].mean()),
            "beat_their_floor": _round(own["beats_floor"][here].mean()),
        }
    return found


def _spoilt(model: Model, section, folder: Path) -> dict:
    Image.MAX_IMAGE_PIXELS = None  # whole slides are larger than what Pillow takes for harmless
    with Image.open(section.slide.path) as image:
        image = image.convert("RGB")
    hue, saturation, value = image.convert("HSV").split()
    turned = Image.merge("HSV", (hue.point(lambda level: (level + 85) % 256), saturation, value)).convert("RGB")
    sigma = BLUR_UM / section.um_per_px
    images = {"blurred": image.filter(ImageFilter.GaussianBlur(sigma)), "hue": turned}
    cases = {
        "as_it_is": (section.slide.path, 1.0),
        "half": (section.slide.path, 0.5),
        "double": (section.slide.path, 2.0),
    }
    for name, spoilt in images.items():
        spoilt.save(folder / f"{name}.jpg", quality=95)
        cases[name] = folder / f"{name}.jpg", 1.0
    said = {}
    for name, (path, scale) in cases.items():
        um = section.um_per_px * scale
        found = model.predict(path, um_per_px=um, spacing_um=SPOILT_UM * scale, progress=False)
        bad = {c["check"]: c["verdict"] for c in json.loads(found.uns["stexp"]["checks"]) if c["verdict"] != "ok"}
        said[name] = {"not_ok": bad, "verdict": str(found.uns["stexp"]["verdict"])}
    return said


def _split(where: np.ndarray) -> list[tuple[str, np.ndarray]]:
    return [(name, rows) for name, rows in (("unlike", where), ("like", ~where)) if rows.any()]


def _by_third(values: np.ndarray, by: np.ndarray) -> list[float]:
    return [_round(np.nanmean(values[part])) for part in np.array_split(np.argsort(by), 3)]


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {f"{q:.0%}": _round(np.nanquantile(values, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    known = np.isfinite(a) & np.isfinite(b)
    return _round(spearmanr(a[known], b[known]).statistic)


def _round(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None


def main() -> None:
    warnings.filterwarnings("ignore", "Mean of empty slice")  # genes that a section does not measure
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--calibrate", type=Path, nargs="+", required=True, help="other folds of the same method")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the record")
    given = parser.parse_args()
    source, others = Run(given.run), [Run(path) for path in given.calibrate]
    with tempfile.TemporaryDirectory() as folder:
        facts = export(given.run, Path(folder) / "model.stexp", alpha=0.1)
        model = load_model(Path(folder) / "model.stexp")
        genes = list(model.genes.index)
        table, model.facts["interval"] = calibrate(others, genes)
        accuracy, sections = expected_accuracy(others, genes)
        own, _ = expected_accuracy([source], source.panel)
        model.genes[list(table)], model.genes[list(ABOUT)] = table, accuracy[list(ABOUT)]
        found, names = {}, source.before.obs["section"].to_numpy(str)
        for section in source.data.sections:
            if section.name in source.data.names("test"):
                observed = source.before.layers["observed"][names == section.name]
                found[section.name] = measure(model, section, observed, own, Path(folder))
    record = {
        "command": re.sub(
            r"(?<=\s)/\S*/([^/\s]+)", r"\1", " ".join(["python experiments/predict_from_image.py", *sys.argv[1:]])
        ),
        **git_state(),
        "date": now(),
        "hardware": hardware.describe(),
        "versions": versions(),
        "run": {key: facts[key] for key in ("method", "data", "fold")} | {"commit": source.record.get("commit")},
        "data_manifest": manifest(source.data.sections),
        "known_tiles": facts["known_tiles"],
        "interval_within_the_section": facts["interval"],
        "interval": model.facts["interval"],
        "accuracy_expected_from": sections,
        "sections": found,
    }
    given.output.mkdir(parents=True, exist_ok=True)
    path = given.output / f"predict-{facts['data']}-{facts['fold']}-{facts['method']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
