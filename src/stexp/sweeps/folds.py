"""Folds of a config, before any run."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig

from stexp.config import build, to_plain
from stexp.data.dataset import DataSet
from stexp.data.splits import folds


def folds_of(cfg: DictConfig, test: Sequence[str] | None = None) -> list[str]:
    """Every fold of a config: from the listed sections where the data set lists them, else from the data.

    Parameters
    ----------
    test
        Sections that a fold has to hold out; None: any.
    """
    protocol = build(cfg.protocol)
    listed = cfg.data.sections_of
    if listed is None:
        return folds(DataSet(to_plain(cfg.data)).read_sections(protocol), protocol)
    if protocol.hold_out == "block":
        return [f"block{i + 1}" for i in range(protocol.blocks)]
    patient_of = {str(name): str(patient) for patient, sections in listed.items() for name in sections}
    chosen = cfg.data.sections
    if chosen is None and protocol.published:
        chosen = cfg.data.published_sections
    chosen = [chosen] if isinstance(chosen, str | int) else chosen
    tested = [name for name in patient_of if chosen is None or name in map(str, chosen)]
    tested = [name for name in tested if test is None or name in test]
    return tested if protocol.hold_out == "section" else list(dict.fromkeys(patient_of[name] for name in tested))
