"""What a fit shows: one bar over all epochs on a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from demo_run import overrides_of


def stderr_of(command: list[str], terminal: bool) -> str:
    """What a command writes to stderr, which is a terminal of 160 columns or a pipe."""
    if not terminal:
        return warm.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True).stderr
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "160", "LINES": "50"}
    written = b""
    with warm.begin(command, stdout=subprocess.DEVNULL, stderr=slave, env=environment) as process:
        os.close(slave)
        try:
            while part := os.read(master, 65536):
                written += part
        except OSError:  # Linux says so that the other end is closed
            pass
    os.close(master)
    assert process.returncode == 0, written.decode()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, False])
def test_a_fit_shows_one_bar_or_one_line_an_epoch(demo: Path, tmp_path: Path, terminal: bool) -> None:
    overrides = [*overrides_of(demo, tmp_path / "run"), "trainer.max_epochs=3"]
    text = stderr_of([sys.executable, "-m", "stexp.cli.train", *overrides], terminal)
    lines = re.findall(r"INFO +epoch (\d)/3 ", text)
    assert "v_num" not in text and "epoch 4/" not in text and "epoch 0/" not in text
    if not terminal:
        assert lines == ["1", "2", "3"] and "left" not in text
        return
    assert not lines and "best validation" in text and "loss" in text
    assert re.search(r"epoch 1/3 .* left -:--:--|epoch 1/3 .* left \d:\d\d:\d\d", text)
    beside = r"loss [\d.]+  log_batch [\d.]+  matched [\d.]+  chance [\d.]+  best validation -?[\d.]+\s"
    assert re.search(rf"INFO +3 epochs  {beside}", text), "what is left when the bar goes"
