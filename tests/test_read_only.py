"""Every command where it may not write: status 2, one line that names the place."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import SHORT, demo, prediction
from demo_run import run as train_run


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system that holds a demo, a run of it and its exported model, and is read-only."""
    place = tmp_path_factory.mktemp("disk")
    if shutil.which("mount") is None:
        pytest.skip("there is no mount, with which to make a read-only file system")
    mount = ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(place)]
    made = subprocess.run(mount, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a read-only file system takes root and leave to mount: {made.stderr.strip()}")
    try:
        train_run(place, place / "run", "image_encoder=tiny", "model=mclstexp")
        from stexp.inference.export import export

        export(place / "run", place / "model.stexp")
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


# the command, its arguments, and the place that the message names
CASES = {
    "prepare": lambda disk: [*demo(disk / "data"), f"output_dir={disk / 'prepared'}"],
    "floors": lambda disk: [*demo(disk / "data"), f"output_dir={disk / 'floors'}"],
    "complete": lambda disk: [*demo(disk / "data"), "known=spots", "methods=[]", f"output_dir={disk / 'completed'}"],
    "train": lambda disk: [*demo(disk / "data"), *SHORT, "model=mean", f"output_dir={disk / 'new'}"],
    "score": lambda disk: [f"run={disk / 'run'}"],
    "report": lambda disk: [f"run={disk / 'run'}"],
    "table": lambda disk: [f"runs={disk / 'run'}", f"output_dir={disk / 'table'}"],
    "export": lambda disk: [f"run={disk / 'run'}", f"output={disk / 'again.stexp'}"],
    "predict": lambda disk: prediction(disk / "model.stexp", disk / "data" / "images" / "A1.jpg", disk / "predicted"),
    "analyse": lambda disk: [f"run={disk / 'run'}", "exports=[csv]"],
    "evaluate": lambda disk: [
        *(f"predictions={disk / 'run' / 'predictions.h5ad'}", "name=theirs", "fold=A", "image_encoder=tiny"),
        *demo(disk / "data"),
        f"output_dir={disk / 'theirs'}",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_may_not_be_written_is_named(
    name: str, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = sorted(disk.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", [f"stexp-{name}", *CASES[name](disk)])
    with pytest.raises(SystemExit) as ended:
        sys.exit(importlib.import_module(f"stexp.cli.{name}").main())
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("stexp")]
    assert ended.value.code == 2, error[-2000:]
    assert len(lines) == 1 and str(disk) in lines[0] and "read-only" in lines[0].lower(), error[-2000:]
    assert sorted(disk.rglob("*")) == before
