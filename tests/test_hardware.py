"""Nothing that only Linux has is needed: macOS and Windows have other modules, and figures that are not to be had."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from commands import SHORT, demo

from stexp import hardware
from stexp.errors import InputError

KEPT = Path(__file__).parent / "kept"

ELSEWHERE = """
import builtins, importlib.abc, os, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in {missing}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

for name in {missing}:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Missing())
for name in ("sched_getaffinity", "sched_setaffinity", "posix_fallocate", "posix_fadvise"):
    if hasattr(os, name):
        delattr(os, name)
whole_open = builtins.open

def without_proc(file, *args, **kwargs):
    if str(file).startswith("/proc") and file != "/proc/self/maps":  # which threadpoolctl reads on Linux alone
        raise FileNotFoundError(2, "No such file", str(file))
    return whole_open(file, *args, **kwargs)

builtins.open = without_proc
"""


def run_elsewhere(code: str, missing: tuple[str, ...]) -> str:
    script = ELSEWHERE.format(missing=missing) + code
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_figures_are_left_out_where_a_system_does_not_give_them():
    out = run_elsewhere(
        "from stexp import hardware\nprint(sorted(hardware.describe()), sorted(hardware.peak_memory()))",
        ("resource",),
    )
    assert "'cores'" in out and "'cpu'" in out and "peak_memory_gb" not in out


@pytest.mark.slow
def test_a_slide_is_predicted_and_recorded_without_what_only_linux_has(tmp_path):
    code = f"""
import numpy as np
from pathlib import Path
from PIL import Image
from stexp.cli.prediction import _predict
from stexp.inference.predictor import load_model

rng = np.random.default_rng(0)
Image.fromarray(rng.integers(90, 210, (400, 400, 3), dtype=np.uint8)).save("{tmp_path}/x.png")
Path("{tmp_path}/xy.csv").write_text("pixel_x,pixel_y\\n100,100\\n200,200\\n300,120\\n")
cfg = dict(um_per_px=2.0, grid="hexagonal", spacing_um=100, coordinates="{tmp_path}/xy.csv", genes="panel",
           exclude_slide=False, device="cpu", batch_size=8, overwrite=False)
print(_predict(load_model("{KEPT / "mclstexp"}"), cfg, Path("{tmp_path}/x.png"), Path("{tmp_path}/out")))
"""
    run_elsewhere(code, ("resource",))
    assert {"predictions.h5ad", "provenance.json", "report.html"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


@pytest.mark.slow
def test_a_model_is_trained_and_reported_without_what_only_linux_has(tmp_path):
    out = tmp_path / "run"
    arguments = [*demo(tmp_path / "demo"), *SHORT, "model=mclstexp", "hardware.threads=null", f"output_dir={out}"]
    code = f"""
from stexp.cli.train import main

if __name__ == "__main__":
    sys.argv = {["stexp-train", *arguments]!r}
    main()
"""
    run_elsewhere(code, ("resource",))
    made = {path.name for path in out.iterdir()}
    assert {"predictions.h5ad", "metrics.json", "provenance.json", "report.html"} <= made
    assert "peak_memory_gb" not in json.loads((out / "provenance.json").read_text())


def test_the_peak_is_in_bytes_on_macos_and_in_kilobytes_elsewhere(monkeypatch):
    usage = types.SimpleNamespace(ru_maxrss=2_000_000)
    resource = types.SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: usage)
    monkeypatch.setitem(sys.modules, "resource", resource)

    def nothing(*_):
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", nothing)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert hardware.peak_memory()["peak_memory_gb"] == 0.002
    monkeypatch.setattr(sys, "platform", "freebsd")
    assert hardware.peak_memory()["peak_memory_gb"] == pytest.approx(2.048)


def test_a_figure_that_fails_costs_no_work(monkeypatch):
    def lost(*_):
        raise RuntimeError("the device was lost")

    monkeypatch.setattr(torch.cuda, "is_available", lost)
    assert "gpu" not in hardware.describe() and set(hardware.peak_memory()) <= {"peak_memory_gb"}


@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"),
    [
        (False, False, {"auto": "cpu", "cpu": "cpu", "gpu": None, "cuda": None, "mps": None}),
        (True, False, {"auto": "cuda", "cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "mps": None}),
        (False, True, {"auto": "cpu", "cpu": "cpu", "gpu": "mps", "cuda": None, "mps": "mps"}),
    ],
)
def test_accelerators_are_those_that_torch_sees(monkeypatch, cuda, mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    for name, kind in chosen.items():
        if kind is None:
            with pytest.raises(InputError, match=f"trainer.accelerator={name}: torch sees no GPU"):
                hardware.accelerator_of(name)
        else:
            assert hardware.accelerator_of(name) == kind
    assert hardware.choose_precision("auto", "mps") == "32-true"


def test_another_accelerator_is_refused_by_its_key():
    with pytest.raises(InputError, match="device=tpu: choose auto, cpu, gpu, cuda, mps"):
        hardware.accelerator_of("tpu", "device")
