"""Real data where STEXP_DATA names it, a small run; one thread per worker, so that workers do not stall each other."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from stexp.data.datamodule import SpotDataModule

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # the paper's tables
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


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """Root of a demo data set: three patients with one section each."""
    from demo_run import config, configure  # once the environment is set

    root = tmp_path_factory.mktemp("demo")
    cfg = configure(root, root / "unused")
    config.dataset_of(cfg).read_sections(config.build(cfg.protocol))
    return root


@pytest.fixture(scope="session")
def strict(demo: Path, tmp_path_factory) -> Path:
    """A finished run on them, patient A held out."""
    from demo_run import run

    out = tmp_path_factory.mktemp("runs") / "strict"
    run(demo, out, "trainer.max_epochs=4")
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SpotDataModule:
    """Sections A1, A2, B1, B2 on the training side, one patient's for validation; C1, C2 held out."""
    from sections import make_data

    from stexp.protocol import Protocol

    return make_data(tmp_path_factory.mktemp("sections"), Protocol("strict"))


@pytest.fixture
def site() -> Iterator:
    """A local server whose files misbehave as told."""
    from unreliable import serving

    with serving() as site:
        yield site


@pytest.fixture
def publish(site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a data set of what `site` serves, and returns its root."""
    from unreliable import publisher

    return publisher(site, tmp_path, monkeypatch)
