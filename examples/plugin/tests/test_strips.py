"""The method fits what stexp asks of one, and learns that dark strips differ from light ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def stexp(command: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", f"stexp.{command}", "plugins=[strips]", *arguments], check=True)


def test_the_method_fits() -> None:
    stexp("check", "model=two_layers", "image_encoder=colours")


def test_it_learns(tmp_path: Path) -> None:
    data = ["data=strips", f"data.root={tmp_path / 'strips'}", f"data.cache_dir={tmp_path / 'cache'}"]
    stexp("train", "model=two_layers", *data, "trainer.max_epochs=4", "model.lr=0.01", f"output_dir={tmp_path / 'run'}")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["scores"]["pearson_acg"] > metrics["floors"]["mean"]["pearson_acg"] + 0.3
