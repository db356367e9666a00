"""Whether a slide is one of those that a model was trained on: by its file, and by how it looks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image

from stexp.data.slides.slide import Slide

SIDE = 32  # pixels of a fingerprint
ALIKE = 0.98  # correlation from which on two fingerprints are of one slide, see `fingerprint`
ROLES = ("train", "validation", "reference")


def fingerprint(slide: Slide) -> str:
    """A slide in `SIDE` x `SIDE` pixels of grey, as hexadecimal digits.

    Notes
    -----
    Of five HER2+ sections, three of one biopsy among them, and the demo's, the fingerprints of two slides correlate at
    0.83 at most, whichever way they are turned; those of one slide, three quarters in size and saved at a JPEG quality
    of 30, at 0.999 at least.
    """
    thumbnail, _ = slide.thumbnail(16 * SIDE)
    grey = Image.fromarray(thumbnail).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(grey).tobytes().hex()


def by_digest(digest: str, manifest: Mapping[str, Mapping[str, str]], sections: Mapping[str, list[str]]) -> list[str]:
    """Sections of training that were read from a file with this content.

    Parameters
    ----------
    digest
        See :func:`stexp.data.slides.tiles.file_digest`.
    manifest
        Section -> file -> digest.
    sections
        Role -> sections.
    """
    trained = {name for role in ROLES for name in sections.get(role, [])}
    return sorted(name for name, files in manifest.items() if name in trained and digest in files.values())


def by_look(own: str, fingerprints: Mapping[str, str]) -> list[str]:
    """Sections whose `fingerprint` is this one, the slide turned or mirrored or not."""
    known = {name: image for name, text in fingerprints.items() if (image := _image(text)) is not None}
    image = _image(own)
    if image is None:
        return []
    views = [np.rot90(side, turns) for side in (image, image[::-1]) for turns in range(4)]
    return sorted(name for name, other in known.items() if max(_correlation(view, other) for view in views) >= ALIKE)


def _image(text: str) -> np.ndarray | None:
    """(SIDE, SIDE); None where a text is no fingerprint, or one of a blank image, which is like any other."""
    try:
        values = np.frombuffer(bytes.fromhex(text), dtype=np.uint8).astype(np.float64)
    except ValueError:
        return None
    return values.reshape(SIDE, SIDE) if values.size == SIDE**2 and np.ptp(values) > 0 else None


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])
