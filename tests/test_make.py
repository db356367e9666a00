"""A table of the paper by its make target, on two real sections."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

TOP = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

NEEDS_MAKE = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed here")

SMALL = (
    'data=her2st "data.sections=[B4,C2]" fold=B4 data.download=never data.batch_size=64 protocol.k=100 '
    "trainer.max_epochs=1 trainer.accelerator=cpu image_encoder=tiny hardware.threads=1"
)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(not (shutil.which("make") and (BIN / "stexp-table").exists()), reason="stexp is not installed here")
def test_a_table_of_the_paper_comes_from_real_sections_by_make(tmp_path, real_data):
    # -o: the environment is there, whatever the age of its mark
    command = ["make", "-f", str(TOP / "Makefile"), f"BIN={BIN}", "-o", ".venv/.ready", "tableS6", "DATA="]
    environment = os.environ | {"STEXP_DATA": str(real_data.resolve()), "STEXP_CACHE": str(tmp_path / "cache")}

    def make(args: str) -> subprocess.CompletedProcess:
        given = [*command, f"ARGS={args}"]
        return subprocess.run(given, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    done = make(SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = {path.parent: json.loads(path.read_text()) for path in (tmp_path / "runs").rglob("metrics.json")}
    assert {metrics["fold"] for metrics in runs.values()} == {"B4"}
    table = pd.read_csv(tmp_path / "tables" / "tableS6" / "table.csv")
    rows = table[(table["kind"] == "method") & (table["metric"] == "pearson_acg")].set_index("row")
    assert set(rows.index) == {"l1", "l2", "cosine"} and rows["paper"].tolist() == [0.2301, 0.23, 0.2306]
    assert rows["value"].nunique() == 3, "the distances weigh differently"
    floors = table[(table["label"] == "floor: knn features") & (table["metric"] == "pearson_acg")]
    assert float(floors["value"].iloc[0]) > 0.2, "tiles and counts are joined: colours tell depth on this target"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("predictions.h5ad")}
    assert make(SMALL).returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}, "what is finished is not run again"


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """A folder in which every command was given, as far as its files go."""
    for name in (
        *("cache/tiles/a.npy", "data/demo/sheet.csv", "data/.demo.lock", ".pytest_cache/x"),
        "src/stexp/__pycache__/a.pyc",
        *("data/mine/sheet.csv", "src/stexp/a.py", ".venv/bin/python"),
        *("runs/x/config.yaml", "tables/t/table.csv", "predictions/s/report.html", "prepared/d/spots.csv"),
        *("model.stexp/model.json", ".model.stexp.lock"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in ("tests", "experiments"):
        (tmp_path / name).mkdir()
    return tmp_path


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def make_in(folder: Path, target: str, answer: str = "") -> str:
    command = ["make", "-f", str(TOP / "Makefile"), target]
    return subprocess.run(command, cwd=folder, input=answer, capture_output=True, text=True, check=True).stdout


@NEEDS_MAKE
def test_cleaning_takes_what_can_be_made_again_and_nothing_else(used: Path):
    before = files(used)
    make_in(used, "clean")
    caches = {"cache/tiles/a.npy", ".pytest_cache/x", "src/stexp/__pycache__/a.pyc"}
    assert before - files(used) == caches
    make_in(used, "clean-data")
    assert before - files(used) == caches | {"data/demo/sheet.csv", "data/.demo.lock"}


@NEEDS_MAKE
def test_runs_go_only_when_the_answer_is_yes(used: Path):
    before = files(used)
    for answer in ("", "n\n", "\n"):
        assert "runs" in make_in(used, "clean-runs", answer)
        assert files(used) == before
    make_in(used, "clean-runs", "y\n")
    for target in ("clean", "clean-data", "uninstall"):
        make_in(used, target)
    assert files(used) == {"data/mine/sheet.csv", "src/stexp/a.py"}


@NEEDS_MAKE
@pytest.mark.parametrize(("listed", "installs"), [("+ torch==2.15.0+cpu", True), ("+ nvidia-cublas==13.4.1.3", False)])
def test_torch_for_cpus_is_installed_or_refused(listed: str, installs: bool, tmp_path: Path):
    bin_ = tmp_path / ".venv" / "bin"
    bin_.mkdir(parents=True)
    for name, body in {"python": "", "uv": f'echo "$@" >> {tmp_path}/calls; echo "{listed}" >&2'}.items():
        (bin_ / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin_ / name).chmod(0o755)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text("")
    command = ["make", "-f", str(TOP / "Makefile"), "setup", "TORCH=cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "6.7 GB" in done.stdout and (done.returncode == 0) == installs
    assert ("UV_INDEX" in done.stderr) == (not installs)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert ["--dry-run" in call for call in calls] == ([True, False] if installs else [True])
