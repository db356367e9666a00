"""What is finished of a prediction survives a kill."""

from __future__ import annotations

import numpy as np
import torch

from stexp.inference import parts as module
from stexp.inference.parts import Parts

VALUES = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
ORDER = np.random.default_rng(1).permutation(50)


def fill(parts: Parts, until: int, batch: int = 8) -> None:
    for start in range(parts.done, until, batch):
        rows = ORDER[start : min(start + batch, until)]
        parts.add(rows, {"value": torch.from_numpy(VALUES[rows])})


def test_it_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAVE_EVERY", -1)  # every batch
    fill(Parts(50, tmp_path), 24)
    again = Parts(50, tmp_path)
    assert again.done == 24
    np.testing.assert_array_equal(again.arrays["value"][ORDER[:24]], VALUES[ORDER[:24]])
    fill(again, 50)
    np.testing.assert_array_equal(again.arrays["value"], VALUES)
    np.testing.assert_array_equal(Parts(50, tmp_path).arrays["value"], VALUES)


def test_what_was_not_saved_is_done_again_and_what_is_damaged_too(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAVE_EVERY", 1e9)
    first = Parts(50, tmp_path)
    fill(first, 16)
    first.save()
    fill(first, 32)
    first.save()
    fill(first, 50)
    assert Parts(50, tmp_path).done == 32, "the last batches were not saved"
    (tmp_path / "000000000016.safetensors").write_bytes(b"half")
    assert Parts(50, tmp_path).done == 16
    (tmp_path / "000000000000.safetensors").unlink()
    assert Parts(50, tmp_path).done == 0


def test_a_damaged_part_is_written_over(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAVE_EVERY", -1)
    fill(Parts(50, tmp_path), 50)
    (tmp_path / "000000000024.safetensors").write_bytes(b"half")
    again = Parts(50, tmp_path)
    assert again.done == 24
    fill(again, 50)
    found = Parts(50, tmp_path)
    assert found.done == 50
    np.testing.assert_array_equal(found.arrays["value"], VALUES)


def test_without_a_folder_nothing_is_written():
    parts = Parts(50, None)
    fill(parts, 50)
    parts.save()
    np.testing.assert_array_equal(parts.arrays["value"], VALUES)
