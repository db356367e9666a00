"""A data set as its config describes it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from demo_run import configure
from sections import make_section

from stexp.config import build, dataset_of
from stexp.data import dataset
from stexp.errors import InputError


def test_a_section_listed_under_two_names_is_refused(tmp_path):
    sections = [make_section(tmp_path, "A1", "A"), make_section(tmp_path, "B1", "B", seed=1)]
    dataset._refuse_copies(sections)
    with pytest.raises(InputError, match="A1 and C1 hold the same counts"):
        dataset._refuse_copies([*sections, replace(sections[0], name="C1", patient="C")])


def test_that_spots_are_rows_is_said_once_of_all_tables(demo, tmp_path, caplog):
    cfg = configure(demo, tmp_path / "run", f"data.cache_dir={tmp_path}")  # where nothing was read before
    caplog.set_level("INFO")
    sections = dataset_of(cfg).read_sections(build(cfg.protocol))
    lines = [record.getMessage() for record in caplog.records if "rows" in record.getMessage()]
    n = sum(map(len, sections))
    assert len(sections) == 3
    (line,) = lines
    assert "3 count tables" in line and f"{n} of {n}" in line
