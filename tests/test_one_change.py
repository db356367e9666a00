"""One change at a time: paired over sections with seeds averaged before, and every change is one of known keys."""

from __future__ import annotations

from typing import Any

import one_change
import pytest

from stexp.config.compose import compose


def run(*values: tuple[str, float], left: bool = True, seconds: float = 1.0) -> dict[str, Any]:
    contrast = {"loss": 4.0, "log_batch": 4.1, "matched": 0.1, "chance": 0.02, "left_chance": left}
    sections = {name: {**dict.fromkeys(one_change.SCORES, value), "patient": name[0]} for name, value in values}
    return {"sections": sections, "contrast": contrast, "seconds": seconds}


def test_differences_are_paired_over_sections_with_seeds_averaged_before():
    runs = {
        one_change.PUBLISHED: {"B s0": run(("B:1", 0.1)), "B s1": run(("B:1", 0.3)), "C s0": run(("C:1", 0.0))},
        "other": {"C s0": run(("C:1", 0.2), left=False), "B s1": run(("B:1", 0.4)), "B s0": run(("B:1", 0.2))},
        "in part": {"B s1": run(("B:1", 0.5))},
    }
    table = one_change.compared(runs)
    assert table[one_change.PUBLISHED]["mse"] == {"mean": pytest.approx(0.1)}
    other = table["other"]
    assert other["mse"]["mean"] == pytest.approx(0.25) and other["mse"]["difference"] == pytest.approx(0.15)
    assert (other["runs"], other["left_chance"], other["mse"]["n_sections"]) == (3, 2, 2)
    part = table["in part"]
    assert part["runs"] == 1 and part["mse"]["difference"] == pytest.approx(0.2), "to the same fold and seed alone"
    assert len({line.count("|") for line in one_change.lines(table)}) == 1


@pytest.mark.parametrize("change", one_change.CHANGES)
def test_a_change_is_of_keys_that_there_are(change):
    published = compose("train", one_change.SETTINGS)
    changed = compose("train", [*one_change.SETTINGS, *one_change.CHANGES[change]])
    assert (changed == published) == (change == one_change.PUBLISHED)


def test_folders_of_this_machine_are_left_out_of_the_record():
    keys = ["image_encoder.checkpoint=/a/b/weights.pth", "data=her2st", "data.tile_um=null"]
    assert one_change.elsewhere(keys) == ["image_encoder.checkpoint=weights.pth", *keys[1:]]
