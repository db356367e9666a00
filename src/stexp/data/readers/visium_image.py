"""The image that the spots of a Visium section lie on: found, or given, and compared with what SpaceRanger saw."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import anndata as ad

from stexp.data.readers.visium_scale import FACTORS
from stexp.data.section import Section
from stexp.data.slides.formats import SUFFIXES, is_litter, slide_name
from stexp.data.slides.slide import Slide
from stexp.errors import InputError

log = logging.getLogger(__name__)

HIRES = "tissue_hires_image.png"
CYTASSIST = "cytassist_image.tiff"
REGISTERED = "aligned_tissue_image.jpg"
"""Checkerboard of the CytAssist and the microscope image; SpaceRanger draws it where it was given both."""

WRITTEN_BY_SPACERANGER = {
    HIRES,
    "tissue_lowres_image.png",
    "aligned_fiducials.jpg",
    REGISTERED,
    "detected_tissue_image.jpg",
    CYTASSIST,
}
MOST_OFF_PX = 2.0
"""Sizes of one image, computed and true, differ by less, in pixels of ``tissue_hires_image.png``."""


def find_image(folder: Path, stems: tuple[str, ...] = ()) -> Path | None:
    """The only image of a folder that SpaceRanger did not write; with `stems`, of those called so."""
    images = [
        path
        for path in (sorted(folder.iterdir()) if folder.is_dir() else [])
        if path.suffix.lower() in SUFFIXES and path.is_file() and not is_litter(path)
        if path.name not in WRITTEN_BY_SPACERANGER and (not stems or slide_name(path) in stems)
    ]
    if len(images) > 1:
        names = ", ".join(path.name for path in images)
        raise InputError(f"{folder} has {len(images)} images ({names}); keep one, or name it (data.image=)")
    return images[0] if images else None


def image_of(image: Path | None, root: Path, folder: Path, name: str, n_sections: int) -> Path | None:
    """The full-resolution image of a section: the given one, or the one in or beside its folder.

    Parameters
    ----------
    image
        A file, or a folder with an image called like each section; None: looked for.
    root
        What the user named.
    folder
        Of the section, in which ``spatial`` lies.
    n_sections
        How many sections are read.
    """
    if image is not None:
        return _given_image(image, name, n_sections)
    around = [find_image(folder), find_image(folder / "spatial"), find_image(folder / "microscope_image")]
    if folder.name == "outs" and folder != root:
        around.append(find_image(folder.parent))
    beside = folder.absolute().parent if folder == root else root
    around.append(find_image(beside, stems_of(name)))
    return next((path for path in around if path is not None), None)


def stems_of(name: str) -> tuple[str, ...]:
    """What the image of a section is called beside its folder: the last as 10x offers it for download."""
    return name, f"{name}_image", f"{name}_tissue_image"


def _given_image(image: Path, name: str, n_sections: int) -> Path:
    if image.is_dir():
        own = find_image(image, stems_of(name))
        if own is None:
            raise InputError(f"data.image={image} has no image called {name}")
        return own
    if n_sections > 1:
        raise InputError(
            f"data.image={image} is one file for {n_sections} sections; a folder of <section>.tif would fit"
        )
    return image


def slide_of(
    image: Path | None,
    spatial: Path,
    factors: dict[str, float],
    um_per_px: float,
    where: str,
    cytassist: bool = False,
) -> tuple[Slide | None, float]:
    """The slide of a section, and the factor from positions in full-resolution pixels to its own.

    Parameters
    ----------
    image
        In full resolution; None: ``tissue_hires_image.png`` stands in, which is warned of.
    um_per_px
        Of full-resolution pixels.
    cytassist
        Take the CytAssist's own picture, where the positions are pixels of it.

    Raises
    ------
    InputError
        An image of another size than the positions are of, or a picture of the CytAssist that was not asked for.

    Notes
    -----
    Where ``spaceranger count`` was given ``--image`` beside ``--cytaimage``, "fullres" means that image of a
    microscope. Without it, it means the picture of the CytAssist: eosin alone, at some 3 um a pixel, which shows no
    nuclei. Source: 10x Genomics, "Space Ranger Spatial Outputs".
    """
    size, picture = full_size(spatial, factors), spatial / CYTASSIST
    of_cytassist = size is not None and picture.is_file() and not (spatial / REGISTERED).is_file()
    of_cytassist = of_cytassist and _is_of_size(Slide(picture), size, factors)
    if cytassist:
        return _cytassist_slide(image, picture, of_cytassist, where), 1.0
    reason = f"a picture by the CytAssist, of eosin alone at {um_per_px:.2g} um/px, which shows no nuclei"
    if of_cytassist and (image is None or _is_of_size(Slide(image), size, factors)):
        raise InputError(
            f"{where}: its positions are pixels of {CYTASSIST}, {reason}; spaceranger count with --image as well "
            f"would fit, or data.cytassist=true takes the picture"
        )
    if of_cytassist:
        raise InputError(
            f"{where}: its positions are pixels of {CYTASSIST}, and nothing says where these lie on {image}; "
            f"spaceranger count with --image would fit"
        )
    if image is not None and image.name == CYTASSIST:
        raise InputError(
            f"{where}: {image} is a picture by the CytAssist, of eosin alone; its positions are pixels of the "
            f"microscope's image, which would fit (data.image=)"
        )
    if image is None:
        return _hires_slide(spatial, factors, um_per_px, where)
    slide = Slide(image)
    if size is not None and not _is_of_size(slide, size, factors):
        raise InputError(
            f"{where}: {slide.path} has {slide.size[0]} x {slide.size[1]} px, the full-resolution image about "
            f"{size[0]:.0f} x {size[1]:.0f} (by {HIRES} and tissue_hires_scalef); give that, or leave "
            f"data.image out"
        )
    return slide, 1.0


def section_on(
    slide: Slide | None,
    scale: float,
    name: str,
    patient: str,
    spots: ad.AnnData,
    um_per_px: float,
    files: Sequence[Path],
) -> Section:
    """A section of spots in full-resolution pixels, on a slide whose pixels are `scale` of these."""
    spots.obsm["spatial"] = spots.obsm["spatial"] * scale
    read_from = [*files, *([slide.path] if slide else [])]
    return Section(
        name=name,
        patient=patient,
        spots=spots,
        slide=slide,
        um_per_px=um_per_px / scale,
        files=tuple(file for file in read_from if file.is_file()),
    )


def full_size(spatial: Path, factors: dict[str, float]) -> tuple[float, float] | None:
    """Width and height of the image whose pixels the positions are, by the reduced one; None where nothing says it."""
    scale = factors.get("tissue_hires_scalef")
    if scale is None or not (spatial / HIRES).is_file():
        return None
    width, height = Slide(spatial / HIRES).size
    return width / scale, height / scale


def _is_of_size(slide: Slide, size: tuple[float, float] | None, factors: dict[str, float]) -> bool:
    """Whether a slide is as large as the full-resolution image; True where nobody knows how large that is."""
    if size is None:
        return True
    scale = factors["tissue_hires_scalef"]
    return all(abs(n - expected) * scale <= MOST_OFF_PX for n, expected in zip(slide.size, size, strict=True))


def _cytassist_slide(image: Path | None, picture: Path, of_cytassist: bool, where: str) -> Slide:
    if image is not None and image.absolute() != picture.absolute():
        raise InputError(f"{where}: data.cytassist=true takes {picture}, data.image= names {image}; leave one out")
    if not picture.is_file():
        raise InputError(f"{where}: data.cytassist=true, but there is no {picture}")
    if not of_cytassist:
        raise InputError(
            f"{where}: data.cytassist=true, but nothing says that its positions are pixels of {CYTASSIST}; those of "
            f"spaceranger count with --image are pixels of the microscope's image, which would fit (data.image=)"
        )
    log.warning("%s: tiles are cut from %s, which is of eosin alone and shows no nuclei", where, picture)
    return Slide(picture)


def _hires_slide(spatial: Path, factors: dict[str, float], um_per_px: float, where: str) -> tuple[Slide | None, float]:
    """The reduced image in place of a full-resolution one; no slide where that is missing, too."""
    if not (spatial / HIRES).is_file():
        log.warning("%s: neither a full-resolution image nor %s; its spots can only be referred to", where, HIRES)
        return None, 1.0
    if "tissue_hires_scalef" not in factors:
        raise InputError(f"{where}: without tissue_hires_scalef in {spatial / FACTORS} positions do not fit {HIRES}")
    scale = factors["tissue_hires_scalef"]
    log.warning(
        "%s: no full-resolution image, so %s is used: %.3g um/px instead of %.3g; data.tile_um= lets "
        "tiles show as much tissue as elsewhere",
        where,
        HIRES,
        um_per_px / scale,
        um_per_px,
    )
    return Slide(spatial / HIRES), scale
