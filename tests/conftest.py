"""Real data where STEXP_DATA names it; one thread per worker, so that workers do not stall each other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "STEXP_DATA" not in os.environ:
        for item in items:
            if item.get_closest_marker("data"):
                item.add_marker(pytest.mark.skip(reason="STEXP_DATA is not set: no real data at hand"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real data sets."""
    return Path(os.environ["STEXP_DATA"])
