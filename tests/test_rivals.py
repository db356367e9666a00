"""What consensus must beat: every method is one of known keys, a corrected one differs by its correction alone."""

from __future__ import annotations

import one_change
import pytest
import rivals
from ablation_table import best_first
from test_one_change import run

from stexp.config.compose import compose


@pytest.mark.parametrize("name", rivals.METHODS)
def test_a_method_is_of_keys_that_there_are(name):
    cfg = compose("train", rivals.METHODS[name])
    assert cfg.model.name == name.split(",")[0]
    if name.endswith("corrected"):
        plain = compose("train", rivals.METHODS[cfg.model.name])
        plain.model.correct = True
        assert cfg == plain


def test_differences_are_to_consensus_without_a_contrastive_loss():
    runs = {
        rivals.BASE: {"B s0": run(("B:1", 0.1)), "B s1": run(("B:1", 0.3))},
        "deepspot": {"B s0": run(("B:1", 0.3)), "B s1": run(("B:1", 0.5))},
    }
    for of in runs.values():
        for each in of.values():
            del each["contrast"]
    table = one_change.compared(runs, rivals.BASE)
    assert table["deepspot"]["pearson_acg"]["difference"] == pytest.approx(0.2)
    assert [line.split("|")[1].strip() for line in best_first(table)[2:]] == ["deepspot", "consensus"]
