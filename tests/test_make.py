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

SMALL = (
    'data=her2st "data.sections=[B4,C2]" data.download=never data.batch_size=64 protocol.k=100 trainer.max_epochs=1 '
    "trainer.accelerator=cpu image_encoder=tiny hardware.threads=1"
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
    assert {metrics["fold"] for metrics in runs.values()} == {"B4", "C2"}
    table = pd.read_csv(tmp_path / "tables" / "tableS6" / "table.csv")
    rows = table[(table["kind"] == "method") & (table["metric"] == "pearson_acg")].set_index("row")
    assert set(rows.index) == {"l1", "l2", "cosine"} and rows["paper"].tolist() == [0.2301, 0.23, 0.2306]
    assert rows["value"].nunique() == 3, "the distances weigh differently"
    floors = table[(table["label"] == "floor: knn features") & (table["metric"] == "pearson_acg")]
    assert float(floors["value"].iloc[0]) > 0.2, "tiles and counts are joined: colours tell depth on this target"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("predictions.h5ad")}
    assert make(SMALL).returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}, "what is finished is not run again"
