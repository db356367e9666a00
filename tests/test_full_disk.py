"""Every command on a disk that takes no more: status 2, one line that names the file, no half file left."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm
from commands import SHORT, command, demo, environment, prediction

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="no limit of the size of a file")]

RESULTS = ("predictions.h5ad", "floors.h5ad", "report.html", "provenance.json", "embeddings.h5ad", "pictures.h5")
# what is run, the limit in bytes, and the file that it stops at
CASES = [
    ("prepare", 1_000, "spots.csv.gz"),
    ("prepare", 30_000, "A1.png"),
    ("cut", 100_000, "cache/tiles/A1-"),
    ("train", 1_000, "config.yaml"),
    ("train", 100_000, ".ckpt"),
    ("results", 20_000, ".h5"),
    ("results", 1_500_000, ".h5ad"),
    ("export", 20_000, "model.safetensors"),
    ("predict", 20_000, ".safetensors"),
    ("predict", 3_000_000, "predictions.h5ad"),
    ("score", 1_000, "per_gene.csv"),
    ("report", 100_000, "report.html"),
    ("geojson", 20_000, "A1.geojson"),
    ("csv", 20_000, "predicted.csv.gz"),
    ("ome_tiff", 10_000, "A1.ome.tiff"),
    ("h5ad", 50_000, "spots.h5ad"),
    ("table", 100, "table.md"),
    ("evaluate", 1_000, "config.yaml"),
    ("evaluate", 20_000, "cache/features/A1-"),
    ("floors", 100, "floors."),
    ("features", 50_000, "cache/features/A1-"),
    ("spatialdata", 10_000, "spatialdata.zarr"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A demo whose tiles are cut, a run of it and its exported model."""
    home = tmp_path_factory.mktemp("disk")
    for name, *arguments in (
        ("train", *demo(home / "demo"), *SHORT, "model=mclstexp", f"output_dir={home / 'run'}"),
        ("export", f"run={home / 'run'}", f"output={home / 'model.stexp'}"),
    ):
        warm.run(command(name, *arguments), env=environment(home), check=True, capture_output=True)
    yield home


def arguments_of(what: str, home: Path, place: Path) -> list[str]:
    """The command, with its inputs under `home` and what it writes in `place`."""
    run = place / "run"
    if what in ("results", "score", "report", "geojson", "csv", "ome_tiff", "h5ad", "spatialdata", "table"):
        shutil.copytree(home / "run", run)
    if what == "results":
        for name in RESULTS:
            (run / name).unlink(missing_ok=True)
    if what in ("train", "results"):
        return command("train", *demo(home / "demo"), *SHORT, "model=mclstexp", f"output_dir={run}")
    cache = [f"data.cache_dir={place / 'cache'}"]
    if what == "features":
        shutil.copytree(home / "cache" / "tiles", place / "cache" / "tiles")
        frozen = ["image_encoder.frozen=true", "data.augmentation=none", "model=stnet"]
        return command("train", *demo(home / "demo"), *SHORT, *cache, *frozen, f"output_dir={run}")
    if what == "evaluate":
        theirs = [f"predictions={home / 'run' / 'predictions.h5ad'}", "fold=A", "name=theirs"]
        return command("evaluate", *theirs, *demo(home / "demo"), f"output_dir={place / 'theirs'}")
    if what == "floors":
        return command("floors", *demo(home / "demo"), "image_encoder=tiny", f"output_dir={place / 'floors'}")
    if what in ("prepare", "cut"):
        own = cache if what == "cut" else []
        return command("prepare", *demo(home / "demo"), *own, f"output_dir={place / 'prepared'}")
    if what == "export":
        return command("export", f"run={home / 'run'}", f"output={place / 'model.stexp'}")
    if what == "predict":
        slide = home / "demo" / "images" / "A1.jpg"
        return command("predict", *prediction(home / "model.stexp", slide, place / "predicted"))
    if what == "table":
        return command("table", f"runs={run}", f"output_dir={place / 'table'}")
    if what in ("score", "report"):
        return command(what, f"run={run}")
    return command("analyse", f"run={run}", f"exports=[{what}]")


def assert_stopped(done: subprocess.CompletedProcess, place: Path, name: str, reason: str) -> None:
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    lines = [line for line in done.stderr.splitlines() if line.startswith("stexp")]
    assert len(lines) == 1 and name in lines[0] and reason in lines[0].lower(), done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert [path for path in place.rglob("*") if ".part" in path.name] == []


@pytest.mark.parametrize(("what", "limit", "name"), CASES, ids=[f"{what}-{limit}" for what, limit, _ in CASES])
def test_a_file_that_may_not_grow(home: Path, tmp_path: Path, what: str, limit: int, name: str) -> None:
    arguments = arguments_of(what, home, tmp_path)
    done = warm.run(arguments, env=environment(home), cwd=tmp_path, capture_output=True, text=True, largest_file=limit)
    assert_stopped(done, tmp_path, name, "file too large")
    if what == "predict" and limit > 1_000_000:  # the rest is done by the same command
        again = warm.run(arguments, env=environment(home), cwd=tmp_path, capture_output=True)
        assert again.returncode == 0 and (tmp_path / "predicted" / "A1" / "report.html").is_file()


@pytest.mark.parametrize(("what", "size"), [("predict", "2m"), ("train", "1m"), ("export", "1m"), ("h5ad", "7m")])
def test_a_disk_that_is_full(home: Path, tmp_path: Path, what: str, size: str) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        arguments = _on(what, home, small)
        done = warm.run(arguments, env=environment(home), cwd=tmp_path, capture_output=True, text=True)
        assert_stopped(done, small, str(small), "no space left")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def _on(what: str, home: Path, small: Path) -> list[str]:
    """The arguments of a command that writes to a small disk; an export is of a run that lies beside it."""
    if what != "h5ad":
        return arguments_of(what, home, small)
    (small / "run").mkdir()
    for name in ("predictions.h5ad", "config.yaml", "provenance.json"):
        shutil.copy(home / "run" / name, small / "run")
    return command("analyse", f"run={small / 'run'}", "exports=[h5ad]")
