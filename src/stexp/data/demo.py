"""A small data set of made-up tissue: H&E-like images and the counts that belong to them.

Written in the layout of a user's own data (see `stexp.data.readers.samplesheet`), so that everything a real
data set goes through is gone through. What the images tell about the genes is known by construction:

========  ==========================================================================================
family    log mean of a gene at a spot
========  ==========================================================================================
full      what is drawn in the spot: nuclei of tumour, stroma and immune cells, fat, number of nuclei
part      half of that, and what no image shows: a gradient across the section, a smooth field of the gene's own
none      a smooth field of the gene's own; nothing in the image tells of it
========  ==========================================================================================

Each family's share of a spot's counts is constant and depth does not depend on the tissue, so that the image does
not tell of the third family by way of library size either. Sections of one patient are cut from one block: their
tissue, fields and stain resemble each other, and the genes' answers to the tissue differ between patients.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from string import ascii_uppercase

import numpy as np
import pandas as pd
from filelock import FileLock
from PIL import Image
from scipy.spatial import cKDTree

from stexp.data.demo_tissue import (
    CELLS,
    COMPARTMENTS,
    GRID_UM,
    Rng,
    Size,
    Tissue,
    lay_out_tissue,
    paint,
    place_nuclei,
    random_field,
    values_at,
)
from stexp.errors import InputError

log = logging.getLogger(__name__)

IMAGE_PX = 1750
VERSION = 2  # raise when the same arguments give other files
# how many genes answer to what, in the family "full"; the others are counted in `_genes`
PROGRAMS = {"tumour": 18, "stroma": 18, "immune": 16, "fat": 8, "nuclei": 12}
N_PART, N_NONE = 68, 60
SHARE = {"full": 0.40, "part": 0.33, "none": 0.27}  # of a spot's counts


@dataclass(frozen=True)
class Array:
    """Capture array; lengths in micrometres."""

    pitch: float
    diameter: float
    hexagonal: bool
    um_per_px: float  # of the scanner that goes with it
    depth: float  # median counts per spot


ARRAYS = (Array(200, 100, False, 2.0, 6000), Array(100, 55, True, 1.25, 4000))  # like ST, like Visium


def write_demo(
    folder: str | Path, *, patients: int = 4, sections_per_patient: int = 2, seed: int = 0, image_px: int = IMAGE_PX
) -> Path:
    """Write the demo data set, unless it is there already with the same arguments.

    Parameters
    ----------
    folder
        Appears whole or not at all. Where a demo data set of other arguments is there already, this one is written to
        a folder in it, such as ``4x2-seed0``.
    patients
        Named A, B, ...; A, C, ... have square arrays (100 um spots at 200 um, as ST) at 2 um per pixel,
        B, D, ... hexagonal ones (55 um at 100 um, as Visium) at 1.25 um per pixel.
    sections_per_patient
        Named A1, A2, ...
    seed
        The same arguments give the same bytes. A section does not change with the number of others.
    image_px
        Width of the images.

    Returns
    -------
    Path
        The sample sheet. Beside it: ``images/``, ``counts/``, ``spots/``, ``genes.csv`` (gene, family, program),
        ``slides.csv`` (images and their scales, for ``stexp-predict slide=``) and ``demo.json`` (the arguments).
    """
    folder = Path(folder).resolve()
    if not 1 <= patients <= len(ascii_uppercase) or sections_per_patient < 1 or seed < 0 or image_px < 400:
        raise InputError(
            f"demo data: patients 1..{len(ascii_uppercase)}, sections_per_patient >= 1, seed >= 0 and image_px >= 400 "
            f"would fit; got {patients}, {sections_per_patient}, {seed}, {image_px}"
        )
    made_from = {
        "generator": __name__,
        "version": VERSION,
        "seed": seed,
        "patients": patients,
        "sections_per_patient": sections_per_patient,
        "image_px": image_px,
    }
    if _is_another(folder, made_from):
        folder = folder / _name(made_from)
        log.info("a demo of other arguments is there; this one is in %s", folder)
    if _made_from(folder) == made_from:
        return folder / "sheet.csv"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if _is_another(folder, made_from):  # which another process wrote meanwhile
                again = {"patients": patients, "sections_per_patient": sections_per_patient}
                return write_demo(folder, **again, seed=seed, image_px=image_px)
            present = _made_from(folder)
            if present == made_from:  # another process was faster
                return folder / "sheet.csv"
            if present is None and folder.exists() and any(folder.iterdir()):
                raise InputError(f"{folder} holds files that are not demo data; give an empty or a new folder")
            _replace(folder, made_from)
    except OSError as error:
        raise InputError(f"demo data cannot be written to {folder} ({error}); give another folder") from error
    return folder / "sheet.csv"


def _is_another(folder: Path, made_from: dict) -> bool:
    """Whether a demo of other arguments is there; one of an earlier version of the same is replaced."""
    present = _made_from(folder)
    return present is not None and {**present, "version": VERSION} != made_from


def _name(made_from: dict) -> str:
    px = made_from["image_px"]
    size = f"{made_from['patients']}x{made_from['sections_per_patient']}-seed{made_from['seed']}"
    return size if px == IMAGE_PX else f"{size}-{px}px"


def _made_from(folder: Path) -> dict | None:
    try:
        found = json.loads((folder / "demo.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("generator") == __name__ else None


def _replace(folder: Path, made_from: dict) -> None:
    """Write into a folder beside, then swap; the caller holds the lock."""
    log.info("writing demo data to %s: %s", folder, ", ".join(f"{key}={made_from[key]}" for key in made_from))
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed
    try:
        _write(beside / "new", made_from)
        if folder.exists():
            folder.rename(beside / "old")
        (beside / "new").rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write(folder: Path, made_from: dict) -> None:
    for kind in ("images", "counts", "spots"):
        (folder / kind).mkdir(parents=True)
    genes = _genes(made_from["seed"])
    rows = []
    for p in range(made_from["patients"]):
        patient, array = ascii_uppercase[p], ARRAYS[p % len(ARRAYS)]
        for s in range(made_from["sections_per_patient"]):
            name = f"{patient}{s + 1}"
            image, spots, counts = _section(made_from, p, s, genes)
            files = {
                "image": f"images/{name}.jpg",
                "counts": f"counts/{name}.tsv.gz",
                "spots": f"spots/{name}.csv",
            }
            Image.fromarray(image).save(folder / files["image"], quality=92, subsampling=0)
            counts.to_csv(folder / files["counts"], sep="\t", compression={"method": "gzip", "mtime": 0})
            spots.to_csv(folder / files["spots"], float_format="%.2f")
            rows.append({"section": name, "patient": patient, **files, "um_per_px": array.um_per_px})
    genes[["family", "program"]].to_csv(folder / "genes.csv")
    sheet = pd.DataFrame(rows)
    sheet.to_csv(folder / "sheet.csv", index=False)
    sheet[["image", "um_per_px"]].rename(columns={"image": "slide"}).to_csv(folder / "slides.csv", index=False)
    (folder / "demo.json").write_text(json.dumps(made_from, indent=2) + "\n")


def _section(made_from: dict, p: int, s: int, genes: pd.DataFrame) -> tuple[np.ndarray, pd.DataFrame, pd.DataFrame]:
    """Image (height, width, 3) uint8, spots and counts (both indexed by spot id) of section `s` of patient `p`."""
    # two streams: what a patient's sections share is drawn from the first, the same for each of them;
    # s + 1, because numpy takes a seed that ends in 0 for the same as one without
    seed, array = made_from["seed"], ARRAYS[p % len(ARRAYS)]
    block, cut = np.random.default_rng((seed, p)), np.random.default_rng((seed, p, s + 1))
    size_px = (made_from["image_px"], int(0.88 * made_from["image_px"]))
    size_um = (size_px[0] * array.um_per_px, size_px[1] * array.um_per_px)
    tissue = lay_out_tissue(block, cut, size_um)
    nuclei = place_nuclei(cut, tissue, size_um)
    image = paint(block, cut, tissue, nuclei, size_px, array.um_per_px)
    spots = _spots(cut, tissue, size_um, array)
    content = _content(spots, nuclei, tissue, array)
    counts = _counts(block, cut, spots, content, genes, size_um, array)
    spots[["pixel_x", "pixel_y"]] /= array.um_per_px
    return image, spots, counts


def _spots(rng: Rng, tissue: Tissue, size_um: Size, array: Array) -> pd.DataFrame:
    """Spots that lie on tissue; pixel_x and pixel_y still in micrometres."""
    row_pitch = array.pitch * (np.sqrt(3) / 2 if array.hexagonal else 1)
    columns, rows = int(size_um[0] / array.pitch), int(size_um[1] / row_pitch)
    y, x = (n.ravel() for n in np.mgrid[:rows, :columns])
    shift = rng.uniform(0, 0.5, 2)
    xy = np.stack([(x + 0.5 * (y % 2) * array.hexagonal + shift[0]) * array.pitch, (y + shift[1]) * row_pitch], axis=1)
    if array.hexagonal:  # Visium counts columns in half pitches
        x = 2 * x + y % 2
    spots = pd.DataFrame(
        {"array_x": x, "array_y": y, "pixel_x": xy[:, 0], "pixel_y": xy[:, 1]},
        index=pd.Index([f"{i}x{j}" for i, j in zip(x, y, strict=True)], name="spot"),
    )
    ring = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    rim = xy[:, None] + array.diameter / 2 * np.stack([np.cos(ring), np.sin(ring)], axis=1)
    fits = ((rim >= 0) & (rim < size_um)).all(axis=(1, 2))
    on_tissue = reduce(np.add, (tissue[name] for name in COMPARTMENTS))
    covered = values_at(on_tissue, rim.reshape(-1, 2)).reshape(len(xy), -1)
    return spots[fits & (covered.mean(axis=1) > 0.75)].copy()


def _content(spots: pd.DataFrame, nuclei: pd.DataFrame, tissue: Tissue, array: Array) -> pd.DataFrame:
    """What was drawn in each spot, about 0..1: one column per program."""
    xy = spots[["pixel_x", "pixel_y"]].to_numpy()
    distance, spot = cKDTree(xy).query(nuclei[["x", "y"]].to_numpy())
    inside = distance < array.diameter / 2
    pairs = len(COMPARTMENTS) * spot[inside] + nuclei["kind"].to_numpy()[inside]
    drawn = np.bincount(pairs, minlength=len(COMPARTMENTS) * len(xy)).reshape(len(xy), -1)
    area = np.pi * (array.diameter / 2) ** 2
    room = np.array([area * cells.kept / cells.spacing**2 for cells in CELLS.values()])
    content = pd.DataFrame(drawn / room, columns=COMPARTMENTS, index=spots.index)
    content["fat"] = values_at(tissue["fat"], xy)
    content["nuclei"] = drawn.sum(axis=1) / (area / 11.0**2)
    return content


def _genes(seed: int) -> pd.DataFrame:
    """Index gene; columns family, program, base (log of the mean) and slope (log change over the program)."""
    rng = np.random.default_rng((seed, len(ascii_uppercase)))  # a stream that no patient has
    rows = [(f"{name.upper()}{i + 1:02}", "full", name) for name, n in PROGRAMS.items() for i in range(n)]
    programs = list(PROGRAMS)
    rows += [(f"MIXED{i + 1:02}", "part", programs[i % len(programs)]) for i in range(N_PART)]
    rows += [(f"HIDDEN{i + 1:02}", "none", "") for i in range(N_NONE)]
    genes = pd.DataFrame(rows, columns=["gene", "family", "program"]).set_index("gene")
    genes["base"] = rng.normal(0, 0.8, len(genes))
    genes["slope"] = rng.uniform(1.6, 2.8, len(genes)) * genes["family"].map({"full": 1, "part": 0.5, "none": 0})
    return genes


def _counts(
    block: Rng, cut: Rng, spots: pd.DataFrame, content: pd.DataFrame, genes: pd.DataFrame, size_um: Size, array: Array
) -> pd.DataFrame:
    """Negative-binomial counts, spots x genes."""
    n, shape = len(genes), (64, 64)
    xy = spots[["pixel_x", "pixel_y"]].to_numpy()
    unit = xy / size_um

    def at(field: np.ndarray) -> np.ndarray:
        return values_at(field, unit * GRID_UM * shape[::-1])

    batch = 0.3 * block.standard_normal(n)
    answer = genes["slope"].to_numpy() * np.exp(0.3 * block.standard_normal(n))
    own = np.stack(
        [at(0.94 * random_field(block, shape, 12) + 0.34 * random_field(cut, shape, 12)) for _ in range(n)], axis=1
    )
    direction = block.uniform(0, 2 * np.pi)
    gradient = 2 * (unit - 0.5) @ [np.cos(direction), np.sin(direction)]

    family = genes["family"].to_numpy()
    program = np.stack([content[name].to_numpy() if name else np.zeros(len(xy)) for name in genes["program"]], axis=1)
    log_mean = genes["base"].to_numpy() + batch + answer * program
    log_mean += own * np.select([family == "full", family == "part"], [0, 0.35], 0.5)
    log_mean += gradient[:, None] * np.where(family == "part", 0.4, 0)
    mean = np.exp(log_mean)
    for name, share in SHARE.items():
        these = family == name
        mean[:, these] *= share / mean[:, these].sum(axis=1, keepdims=True)
    depth = array.depth * np.exp(0.25 * at(random_field(cut, shape, 16)) + 0.3 * cut.standard_normal(len(xy)))
    mean *= depth[:, None]
    dispersion = 12.0  # variance = mean + mean^2 / dispersion
    counts = cut.poisson(mean * cut.gamma(dispersion, 1 / dispersion, mean.shape))
    return pd.DataFrame(counts, index=spots.index, columns=genes.index.to_list())
