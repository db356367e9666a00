"""Each thing that may be wrong with a slide is seen by the check that is there for it, and is not seen elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from stexp.data.readers.samplesheet import read_samplesheet
from stexp.data.slides.stream import tile_batches
from stexp.inference import slide_checks
from stexp.inference.slide_checks import conclude, grain, judge, look, strange

PX, TILE_UM = 64, 120.0
TILE = {"px": PX, "um": TILE_UM, "trained_um_per_px": 1.25, "um_per_px": {"B1": 1.25, "C1": 2.0}}


@pytest.fixture(scope="module")
def tiles(demo) -> dict[str, np.ndarray]:
    found = {}
    for section in read_samplesheet(demo / "data" / "sheet.csv"):
        rows = np.random.default_rng(0).choice(len(section), 60, replace=False)
        side = round(TILE_UM / section.um_per_px)
        found[section.name] = np.concatenate(
            [part for _, part in tile_batches(section.slide, section.xy_px[rows], side, PX, 64)]
        )
    return found


@pytest.fixture(scope="module")
def training(tiles) -> list[dict]:
    return [look(tiles[name], TILE_UM / PX) for name in ("B1", "C1")]


def verdicts(tiles: np.ndarray, training: list[dict], **options) -> dict[str, str]:
    said = {"um": 2.0, "stated": None, "side_px": 60, "tile": TILE, "normalised": False} | options
    return {check["check"]: check["verdict"] for check in judge(look(tiles, TILE_UM / PX), training, **said)}


@pytest.mark.parametrize("name", ["A1", "B1", "C1"])
def test_sections_of_the_same_kind_pass(tiles, training, name):
    assert set(verdicts(tiles[name], training).values()) == {"ok"}


def test_blurred_tiles_are(tiles, training):
    found = verdicts(ndimage.gaussian_filter(tiles["A1"], (0, 2, 2, 0)), training)
    assert found["sharpness"] == "do_not_trust" and found["stain"] == found["scale"] == "ok"


def test_another_stain_is(tiles, training):
    strong = (255 * (tiles["A1"] / 255.0) ** 2).astype(np.uint8)  # twice the optical density
    found = verdicts(strong, training)
    assert found.pop("stain") == "do_not_trust" and found["stain_colour"] == "ok"
    found = verdicts(np.roll(tiles["A1"], 1, axis=3), training)
    assert found["stain_colour"] == "do_not_trust" and found["sharpness"] == "ok"
    softened = verdicts(strong, training, normalised=True)
    assert softened["stain"] == "caution", "colours are brought to training's"


def test_structures_of_another_size_are(tiles, training):
    image = torch.from_numpy(tiles["A1"]).permute(0, 3, 1, 2)
    double = torch.nn.functional.interpolate(image[:, :, 16:48, 16:48], (PX, PX), mode="bilinear", antialias=True)
    assert verdicts(double.permute(0, 2, 3, 1).numpy(), training)["size"] == "do_not_trust"
    # four tiles side by side, in the place of one
    four = np.concatenate([np.concatenate(list(tiles["A1"][i : i + 2]), axis=0) for i in (0, 2)], axis=1)[None]
    small = torch.nn.functional.interpolate(
        torch.from_numpy(four).permute(0, 3, 1, 2), (PX, PX), mode="bilinear", antialias=True
    )
    assert verdicts(small.permute(0, 2, 3, 1).numpy(), training)["size"] != "ok"


def test_what_is_no_tissue_is(tiles, training):
    white = verdicts(np.full_like(tiles["A1"], 250), training)
    assert white["tissue"] == white["stain"] == white["stain_colour"] == "do_not_trust"
    blank = [each | look(np.full_like(tiles["A1"], 250), TILE_UM / PX) for each in training]
    unknown = verdicts(tiles["A1"], blank)
    assert {unknown[name] for name in ("size", "stain", "stain_colour", "sharpness")} == {"caution"}
    noise = np.random.default_rng(0).integers(0, 256, tiles["A1"].shape, dtype=np.uint8)
    found = verdicts(noise, training)
    assert found["size"] == found["stain_colour"] == "do_not_trust"


@pytest.mark.parametrize(
    ("options", "verdict", "says"),
    [
        ({"um": 0.5, "side_px": 240}, "ok", "a tile shows 120 um, in training 120 um"),
        ({"um": 4.0, "side_px": 30}, "caution", "2.0 times as large as those of training"),
        ({"um": 8.0, "side_px": 15}, "do_not_trust", "4.0 times as large"),
        ({"um": 0.5, "side_px": 240, "stated": 0.25}, "caution", "0.5 um per pixel was given, and its file says 0.25"),
        ({"um": None, "side_px": 64}, "caution", "nobody said the scale of this slide: tiles are 64 of its pixels"),
        ({"tile": TILE | {"um": None, "trained_um_per_px": None}}, "caution", "nobody said the scale of the training"),
    ],
)
def test_what_is_said_of_the_scale_is_held_against_training(tiles, training, options, verdict, says):
    said = {"um": 2.0, "stated": None, "side_px": 60, "tile": TILE, "normalised": False} | options
    check = judge(training[0], training, **said)[0]
    assert (check["check"], check["verdict"]) == ("scale", verdict) and says in check["text"]


def test_grain_is_what_its_words_say():
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.integers(100, 160, (3, 1, 128, 128))).expand(-1, 3, -1, -1).float()
    assert np.abs(grain(noise)).max() < 0.1
    density = torch.linspace(0.1, 1, 128).expand(2, 3, 128, 128)
    np.testing.assert_allclose(grain(255 * 10**-density - 1), 4, atol=0.05)
    coarser = [np.median(grain(torch.from_numpy(ndimage.gaussian_filter(noise.numpy(), (0, 0, s, s))))) for s in (1, 2)]
    assert 0.1 < coarser[0] < coarser[1] < 4
    assert np.isnan(grain(torch.full((1, 3, 20, 20), 9.0))).all() and np.isnan(grain(noise[:, :, :4])).all()


def test_sections_that_differ_among_themselves_leave_room_for_others(training):
    slide = training[0] | {"od_red": training[0]["od_red"] + 0.2}
    said = {"um": 2.0, "stated": None, "side_px": 60, "tile": TILE, "normalised": False}
    strength = {check["check"]: check for check in judge(slide, training, **said)}["stain"]
    assert strength["verdict"] != "ok" and "absorbs more red than in training" in strength["text"]
    various = [training[0] | {"od_red": 0.1 + 0.08 * i} for i in range(5)]
    assert {c["check"]: c["verdict"] for c in judge(slide, various, **said)}["stain"] == "ok"


def test_the_verdict_is_that_of_the_worst_check_and_gives_its_reasons(training):
    said = {"um": 2.0, "stated": None, "side_px": 60, "tile": TILE, "normalised": False}
    fine = judge(training[0], training, **said)
    assert conclude(fine).startswith("Nothing speaks against this slide: ")
    some, many = strange(0.2, 0.01), strange(0.8, 0.01)
    caution = conclude([*fine, some])
    assert caution.startswith("Read with caution: 20% of its tiles") and "held-out tiles 1%" in caution
    assert conclude(fine).removeprefix("Nothing speaks against this slide: ") not in caution
    assert conclude([some, many]).startswith(
        "Do not trust this prediction: 80% of its tiles"
    ) and "20%" not in conclude([some, many])
    assert set(slide_checks.VERDICTS) >= {check["verdict"] for check in fine}
