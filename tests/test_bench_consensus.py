"""The benchmark of consensus fits what it made, as it lies in files, and says what it measured."""

from __future__ import annotations

from types import SimpleNamespace

import bench_consensus
import numpy as np


def test_made_up_spots_are_fitted_and_a_section_of_them_is_predicted(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_consensus, "SECTION", 150)
    monkeypatch.setattr(bench_consensus, "BLOCK", 128)
    bench_consensus.make(tmp_path, 450, 16, 20)
    features, expression = (np.load(tmp_path / f"{name}.npy") for name in ("features", "expression"))
    assert features.shape == (450, 16) and expression.shape == (450, 20)
    assert np.isfinite(features).all() and (expression.std(axis=0) > 0.5).all()
    assert len(np.unique(bench_consensus.xy_of(np.arange(150)), axis=0)) == 150
    answers = []
    bench_consensus.run(tmp_path, SimpleNamespace(send=answers.append))
    (row,) = answers
    assert (row["spots"], row["predict"]["spots"], row["searched"]) == (450, 150, 450)
    assert row["fit"]["peak_gb"] > 0 and row["chosen"]["out_of_fold_pearson"] > 0.2
