"""A data set as its config describes it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sections import make_section

from stexp.data import dataset
from stexp.errors import InputError


def test_a_section_listed_under_two_names_is_refused(tmp_path):
    sections = [make_section(tmp_path, "A1", "A"), make_section(tmp_path, "B1", "B", seed=1)]
    dataset._refuse_copies(sections)
    with pytest.raises(InputError, match="A1 and C1 hold the same counts"):
        dataset._refuse_copies([*sections, replace(sections[0], name="C1", patient="C")])
