"""Commands killed at random moments and given again leave what an undisturbed run leaves, number for number."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors.numpy
import torch
import warm
from commands import SHORT, command, demo, environment

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="a process group is killed")]

KILLS = int(os.environ.get("STEXP_KILLS", "14"))
"""Over all commands; ``make test-kills`` has 100."""
OF_THE_MOMENT = {
    *("command", "commit", "date", "dirty", "seconds", "stages", "hardware", "versions", "trained_by"),
    *("peak_memory_gb", "peak_gpu_memory_gb"),
    # a checkpoint holds the time of its epochs, and with it what names it
    *("checkpoint", "checkpoints"),
}
"""Keys of JSON files and of HDF5 that differ between two runs of the same."""
TRAIN = [*demo(Path("demo")), *SHORT]
PIPELINE = {
    "prepare": command("prepare", *demo(Path("demo")), "output_dir=prepared"),
    "train": command("train", *TRAIN, "model=mclstexp", "output_dir=run"),
    "results": command("train", *TRAIN, "model=mclstexp", "output_dir=run"),
    "export": command("export", "run=run", "output=model.stexp", "overwrite=true"),
    "predict": command("predict", "run=model.stexp", "slide=demo/images/A1.jpg", "um_per_px=2", "device=cpu"),
    "report": command("report", "run=run"),
    "sweep": command("train", "-m", *TRAIN, "model=mean,hest_ridge", "fold=A", "output_dir='sweep/${model.name}'"),
}
"""What is given one after the other; `results` after the results of the training are deleted."""


def begin(name: str, home: Path) -> warm.Process | subprocess.Popen:
    env = environment(home) | {"STEXP_CACHE": "cache"}
    with (home / f"{name}.log").open("ab") as log:
        return warm.begin(PIPELINE[name], cwd=home, env=env, stdout=log, stderr=subprocess.STDOUT)


def set_back(name: str, home: Path) -> None:
    if name == "results":
        for file in ("predictions.h5ad", "floors.h5ad", "metrics.json", "report.html", "provenance.json"):
            (home / "run" / file).unlink()


def finish(name: str, home: Path) -> float:
    """Give a command and wait for its end; the seconds that it took."""
    start = time.perf_counter()
    status = begin(name, home).wait(timeout=300)
    assert status == 0, (home / f"{name}.log").read_text()[-3000:]
    return time.perf_counter() - start


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """Where every command ran to its end at once, and how long each took."""
    home = tmp_path_factory.mktemp("undisturbed")
    seconds = {}
    for name in PIPELINE:
        set_back(name, home)
        seconds[name] = finish(name, home)
    return home, seconds


def plain(value: Any, model: str) -> Any:
    """JSON, but for what differs between two runs of the same; the digest of the exported model, which holds its date,
    by the word for it."""
    if isinstance(value, dict):
        return {key: plain(inner, model) for key, inner in value.items() if key not in OF_THE_MOMENT}
    if isinstance(value, list):
        return [plain(item, model) for item in value]
    return "the exported model" if value == model else value


def exact(value: Any) -> Any:
    """An array as bytes, which NaN does not make unequal; of objects, and what is no array, the value."""
    if not isinstance(value, np.ndarray) or value.dtype.kind == "O":
        return value.tolist() if isinstance(value, np.ndarray) else value
    return value.dtype.str, value.shape, value.tobytes()


def hdf5_content(path: Path, model: str) -> dict[str, Any]:
    datasets: dict[str, Any] = {}

    def keep(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset) and name.rpartition("/")[2] not in OF_THE_MOMENT:
            value = item[()]
            datasets[name] = plain(value.decode() if isinstance(value, bytes) else exact(value), model)

    with h5py.File(path) as file:
        file.visititems(keep)
    return datasets


def content(path: Path, model: str) -> Any:
    """What a file holds, in a form that is equal for equal results; `model` is the digest of the exported one."""
    if path.suffix == ".json":
        return plain(json.loads(path.read_text()), model)
    if path.suffix in (".h5ad", ".h5"):
        return hdf5_content(path, model)
    if path.suffix == ".npy":
        return exact(np.load(path))
    if path.suffix == ".safetensors":
        return {key: exact(array) for key, array in safetensors.numpy.load_file(path).items()}
    if path.suffix == ".ckpt":
        state = torch.load(path, weights_only=True)
        weights = {key: exact(tensor.numpy()) for key, tensor in state["state_dict"].items()}
        return state["epoch"], state["global_step"], weights
    return path.read_bytes()


def results(home: Path) -> dict[str, Path]:
    """Files that a command leaves, but for logs, seconds of stages, and what says dates, seconds or its own folder."""
    return {
        str(path.relative_to(home)): path
        for path in sorted(home.rglob("*"))
        if path.is_file()
        and path.suffix not in (".log", ".lock", ".html")
        and path.name not in ("stages.json", "multirun.yaml")
        and "logs" not in path.relative_to(home).parts
        and not (path.parent.name == "sections" and path.suffix == ".json")
    }


def contents(home: Path) -> dict[str, Any]:
    model = json.loads((home / "model.stexp" / "model.json").read_text())["digest"]
    return {name: content(path, model) for name, path in results(home).items()}


def test_killed_commands_end_as_undisturbed_ones(undisturbed: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    calm, seconds = undisturbed
    draws = np.random.default_rng(0)
    names = list(PIPELINE)
    kills = {name: KILLS // len(names) + (i < KILLS % len(names)) for i, name in enumerate(names)}
    killed = 0
    for name in names:
        set_back(name, tmp_path)
        for moment in draws.uniform(0.05, 1, kills[name]):
            process = begin(name, tmp_path)
            try:
                process.wait(timeout=moment * seconds[name])
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                killed += 1
        finish(name, tmp_path)
    assert killed > KILLS / 2, "others ended before their moment came: what was finished is not done again"
    disturbed, expected = contents(tmp_path), contents(calm)
    assert set(disturbed) == set(expected)
    assert [name for name in expected if expected[name] != disturbed[name]] == []
    for page in ("run/report.html", "predictions/A1/report.html"):
        assert (tmp_path / page).stat().st_size == pytest.approx((calm / page).stat().st_size, rel=0.01)
