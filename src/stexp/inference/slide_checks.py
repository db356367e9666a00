"""Whether a slide looks like those that a model was trained on: scale, size of structures, stain, sharpness, tissue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np
import torch
from torch.nn import functional as F

from stexp.data.quality import APART
from stexp.data.slides.stain import StainNormaliser
from stexp.data.tile_measures import OF_TILES, measure
from stexp.errors import InputError

VERDICTS = ("ok", "caution", "do_not_trust")

# from which on there is caution, and no trust
Z = (3.5, 7.0)  # the first as Iglewicz & Hoaglin (1993) have it for outliers
RESOLUTION = (1.5, 3.0)  # pixels larger than those of training, which shows as blur
SIZE = (1.4, 1.7)  # of structures against training; sections of HER2+ are within 1.1 of each other
ANGLE = (12.0, 25.0)  # degrees between stains; two patients of HER2+ are 9 apart, they and a mouse colon 14 to 21
TISSUE = (2.0, 4.0)  # times less tissue on a tile than on those of the section of training with least
STRANGE = (0.1, 0.5)  # share of tiles unlike those of training, of which one in a hundred would be
TRAINED = "training_slide"
"""The check of whether a slide is one of those of training."""
SAME = 0.1  # share of tiles that are tiles of training, from which on a slide is one of training

CHANNELS = {"od_red": "red", "od_green": "green", "od_blue": "blue"}
LAGS = (1, 4)  # pixels, see `grain`


def look(tiles: np.ndarray, um_per_px: float | None) -> dict[str, float | list | None]:
    """What some tiles of a section show, as plain values; None for what cannot be measured.

    Parameters
    ----------
    tiles : (n, px, px, 3) uint8
    um_per_px
        Of the tiles.

    Returns
    -------
    dict
        ``tissue``: mean share of a tile; ``blur``: median; ``od_red``, ...: mean over tissue, see
        `stexp.data.tile_measures.measure`. ``grain``, ``grain_half``, ``grain_double``: `grain` of the tiles, and of
        the same with everything half and twice as large. ``stains`` (2, 3): haematoxylin and eosin, unit vectors of
        optical density, after Macenko et al. 2009.
    """
    table = dict(zip(OF_TILES, measure(tiles, um_per_px).T, strict=True))
    tissue = np.nan_to_num(table["tissue"])
    measured: dict[str, float | list | None] = {"tissue": float(tissue.mean()), "blur": _median(table["blur"])}
    weight = tissue.sum()
    for name in CHANNELS:
        measured[name] = float(np.nansum(tissue * table[name]) / weight) if weight > 0 else None
    shows = tissue >= min(0.5, tissue.max())
    image = torch.from_numpy(np.ascontiguousarray(tiles[shows])).permute(0, 3, 1, 2).float()
    height, width = image.shape[2] // 4, image.shape[3] // 4
    middle = image[:, :, height : image.shape[2] - height, width : image.shape[3] - width]
    measured["grain"] = _median(grain(image))
    for name, part, factor in (("half", image, 0.5), ("double", middle, 2.0)):
        resized = F.interpolate(part, scale_factor=factor, mode="bilinear", antialias=True)
        measured[f"grain_{name}"] = _median(grain(resized))
    try:
        stain = StainNormaliser.fit("macenko", ["slide"], [tiles], [np.ones(len(tiles), bool)])
        measured["stains"] = stain.target["stains"].tolist()
    except InputError:
        measured["stains"] = None
    return measured


def grain(image: torch.Tensor) -> np.ndarray:
    """How coarse images (B, 3, h, w) of 0..255 are, (B,).

    log2 of the mean squared difference of optical density between pixels 4 apart, over that of neighbours: 0 for
    noise, 4 for ramps. It grows with the size of what is shown, and with blur. NaN for images without any difference.
    """
    density = -torch.log10((image.clamp(max=254) + 1) / 255).mean(1)
    if min(density.shape[1:]) <= LAGS[1]:
        return np.full(len(density), np.nan)
    near, far = (
        reduce(
            torch.add,
            (
                (density.narrow(axis, lag, n - lag) - density.narrow(axis, 0, n - lag)).square().mean((1, 2))
                for axis, n in enumerate(density.shape[1:], start=1)
            ),
        )
        for lag in LAGS
    )
    ratio = torch.log2(far / near)
    return torch.where(torch.isfinite(ratio), ratio, torch.nan).double().numpy()


def judge(
    slide: dict,
    training: Sequence[dict],
    *,
    um: float | None,
    stated: float | None,
    side_px: int,
    tile: dict,
    normalised: bool,
) -> list[dict]:
    """Hold a slide against the sections of training.

    Parameters
    ----------
    slide, training
        What `look` measures on the slide, and on each section of training.
    um, stated
        Micrometres per level-0 pixel of the slide as used, and as its file says.
    side_px
        Side of a tile in level-0 pixels.
    tile
        Of the model: ``px``, ``um``, ``trained_um_per_px``, ``um_per_px``.
    normalised
        Whether the stain of slides is brought to that of training: another one is then no reason for no trust.

    Returns
    -------
    list of dict
        ``check``, ``value``, ``expected``, ``verdict`` (one of `VERDICTS`), ``text``; plain values.
    """
    return [
        _scale(um, stated, side_px, tile),
        _size(slide, training, um, stated),
        _strength(slide, training, normalised),
        _direction(slide, training, normalised),
        _sharpness(slide, training, um, stated),
        _tissue(slide, training),
    ]


def strange(share: float, held_out_share: float) -> dict:
    """The check of how many tiles (0..1) are unlike those of training."""
    text = f"{share:.0%} of its tiles are unlike those of training (of held-out tiles {held_out_share:.0%} were)"
    return _check("unlike_training", share, [0.0, STRANGE[0]], _graded(share, STRANGE), text)


def trained(sections: Mapping[str, str], same_share: float, n_excluded: int | None) -> dict:
    """The check of whether a slide is one of those of training: its numbers are then no prediction.

    Parameters
    ----------
    sections
        Those that it is -> by what that shows; see :mod:`stexp.inference.training_slides`.
    same_share
        Share (0..1) of its tiles that are training tiles themselves.
    n_excluded
        References that were left out; None of a method that has none.
    """
    if not sections and same_share < SAME:
        return _check(TRAINED, same_share, [0.0, SAME], "ok", "it is none of the slides of training")
    names = ", ".join(f"{name}, {how}" for name, how in sections.items())
    shown = f" (section {names})" if sections else f": {same_share:.0%} of its tiles are tiles of training"
    if n_excluded is None:
        text = f"this slide is among those of training{shown}"
    elif n_excluded:
        text = f"this slide is among the references{shown}; its {n_excluded} spots were left out, training saw them"
    else:
        text = f"this slide is among the references{shown}: it retrieves itself; exclude_slide=true leaves it out"
    return _check(TRAINED, max(same_share, float(bool(sections))), [0.0, SAME], "caution", text)


def conclude(checks: list[dict]) -> str:
    """One verdict in plain language."""
    worst = max((check["verdict"] for check in checks), key=VERDICTS.index)
    if worst == "ok":
        return "Nothing speaks against this slide: " + "; ".join(check["text"] for check in checks) + "."
    # that a slide trained is said whatever else is wrong with it
    trained_too = [check for check in checks if check["check"] == TRAINED and check["verdict"] not in ("ok", worst)]
    said = [*(check for check in checks if check["verdict"] == worst), *trained_too]
    reasons = "; ".join(check["text"] for check in said)
    return f"{'Read with caution' if worst == 'caution' else 'Do not trust this prediction'}: {reasons}."


def _scale(um: float | None, stated: float | None, side_px: int, tile: dict) -> dict:
    shown = tile["um"] or (tile["trained_um_per_px"] and tile["px"] * tile["trained_um_per_px"])
    if um is None or shown is None:
        who = "of this slide" if um is None else "of the training sections"
        return _check("scale", um, None, "caution", f"nobody said the scale {who}: tiles are {side_px} of its pixels")
    finest = max(shown / tile["px"], *(each or 0 for each in tile["um_per_px"].values()))
    verdict = _graded(um / finest, RESOLUTION)
    text = f"a tile shows {side_px * um:.0f} um, in training {shown:.0f} um"
    if verdict != "ok":
        text = f"its pixels of {um:.3g} um are {um / finest:.1f} times as large as those of training"
    elif stated and max(um, stated) > 1.1 * min(um, stated):
        verdict, text = "caution", f"{um:.3g} um per pixel was given, and its file says {stated:.3g}"
    return _check("scale", um, [0.0, RESOLUTION[0] * finest], verdict, text)


def _given(um: float | None, stated: float | None) -> str:
    """The scale as it was given, for where it may be the cause of what looks larger, smaller or blurred."""
    if um is None:
        return ""
    return f" ({um:.3g} um per pixel, as {'its file says' if stated == um else 'um_per_px= says'})"


def _size(slide: dict, training: Sequence[dict], um: float | None, stated: float | None) -> dict:
    curve = [
        np.median([each[key] for each in training if each[key] is not None] or [np.nan])
        for key in ("grain_half", "grain", "grain_double")
    ]
    expected = [1 / SIZE[0], SIZE[0]]
    if slide["grain"] is None or not (np.diff(curve) > 0).all():
        return _check("size", None, expected, "caution", "how large its structures are could not be measured")
    size = float(2 ** np.interp(slide["grain"], curve, [-1, 0, 1]))
    verdict = _graded(max(size, 1 / size), SIZE)
    text = f"its structures look {size:.2f} times as large as in training"
    if verdict != "ok":
        other = "blurred" if size > 1 else "no tissue like that of training"
        text += f": the stated scale is not right{_given(um, stated)}, or it is {other}"
    return _check("size", size, expected, verdict, text)


def _strength(slide: dict, training: Sequence[dict], normalised: bool) -> dict:
    if slide["od_red"] is None:
        return _check("stain", None, None, "do_not_trust", "no stained tissue was found on its tiles")
    if all(each["od_red"] is None for each in training):
        return _check("stain", None, None, "caution", "no stained tissue was found on the training tiles")
    scores = {name: _z(slide[name], training, name) for name in CHANNELS}
    worst = max(scores, key=lambda name: abs(scores[name][0]))
    z, middle, spread = scores[worst]
    verdict = _softened(_graded(abs(z), Z), normalised)
    text = "its tissue absorbs as much light as in training"
    if abs(z) >= Z[0]:
        text = (
            f"its tissue absorbs {'more' if z > 0 else 'less'} {CHANNELS[worst]} than in training (optical density "
            f"{slide[worst]:.2f} against {middle:.2f}, z {z:+.1f})"
        )
    return _check("stain", slide[worst], [middle - Z[0] * spread, middle + Z[0] * spread], verdict, text)


def _direction(slide: dict, training: Sequence[dict], normalised: bool) -> dict:
    known = np.array([each["stains"] for each in training if each["stains"] is not None])
    if slide["stains"] is None or not len(known):
        who = "its tiles" if slide["stains"] is None else "the training sections"
        text = f"haematoxylin and eosin cannot be told apart on {who}"
        return _check(
            "stain_colour", None, [0.0, ANGLE[0]], "do_not_trust" if slide["stains"] is None else "caution", text
        )
    middle = np.median(known, axis=0)
    angle = float(_angles(np.array(slide["stains"]), middle).max())
    # sections of training may differ more than those the limits are from
    wider = max(1.0, float(_angles(known, middle).max()) / ANGLE[0])
    limits = (ANGLE[0] * wider, ANGLE[1] * wider)
    text = f"its stains differ by {angle:.0f} degrees from those of training"
    return _check("stain_colour", angle, [0.0, limits[0]], _softened(_graded(angle, limits), normalised), text)


def _sharpness(slide: dict, training: Sequence[dict], um: float | None, stated: float | None) -> dict:
    if slide["blur"] is None or all(each["blur"] is None for each in training):
        return _check("sharpness", None, None, "caution", "how sharp it is could not be measured")
    z, middle, spread = _z(slide["blur"], training, "blur")
    text = "it is as sharp as in training"
    if z >= Z[0]:
        text = (
            f"it is less sharp than in training (blur {slide['blur']:.2f} against {middle:.2f}, z {z:+.1f}): it is out "
            f"of focus, or the stated scale is not right{_given(um, stated)}"
        )
    return _check("sharpness", slide["blur"], [0.0, middle + Z[0] * spread], _graded(z, Z), text)


def _tissue(slide: dict, training: Sequence[dict]) -> dict:
    least = min(each["tissue"] for each in training)
    times = least / max(slide["tissue"], 1e-6)
    text = f"tissue fills {slide['tissue']:.0%} of its tiles, in training {least:.0%} or more"
    return _check("tissue", slide["tissue"], [least / TISSUE[0], 1.0], _graded(times, TISSUE), text)


def _z(value: float, training: Sequence[dict], name: str) -> tuple[float, float, float]:
    """Robust z-score among sections, their median and spread, which is no less than what sections differ by anyway."""
    values = np.array([each[name] for each in training if each[name] is not None], dtype=float)
    middle = float(np.median(values))
    spread = max(float(np.median(np.abs(values - middle))) / 0.6745, APART[name])
    return (value - middle) / spread, middle, spread


def _angles(stains: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """Degrees between stains (..., 2, 3) and those of `middle`."""
    cosine = (stains * middle).sum(-1) / np.linalg.norm(stains, axis=-1) / np.linalg.norm(middle, axis=-1)
    return np.rad2deg(np.arccos(np.clip(cosine, -1, 1)))


def _graded(value: float, limits: tuple[float, float]) -> str:
    return VERDICTS[sum(value >= limit for limit in limits)]


def _softened(verdict: str, normalised: bool) -> str:
    return "caution" if normalised and verdict == "do_not_trust" else verdict


def _check(name: str, value: float | None, expected: list | None, verdict: str, text: str) -> dict:
    rounded = None if expected is None else [round(each, 4) for each in expected]
    return {
        "check": name,
        "value": None if value is None else round(float(value), 4),
        "expected": rounded,
        "verdict": verdict,
        "text": text,
    }


def _median(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None
