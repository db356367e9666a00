"""experiments/gpu.sh: the dry run, what it does about failures, and what is packed for a bare machine."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import gpu
import gpu_pack
import gpu_table
import pytest
import results
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from stexp.files import CONF

TOP = Path(__file__).parents[1]


@pytest.fixture
def machine(tmp_path: Path) -> gpu.Machine:
    facts = {"gpu": ["Some card"], "gpu_memory_gb": 80.0, "commit": "abc", "dirty": False}
    (tmp_path / "out").mkdir()
    return gpu.Machine(tmp_path / "pack", tmp_path / "out", tmp_path, time.monotonic() + 600, True, facts)


@pytest.mark.slow
def test_the_dry_run_leaves_a_json_of_every_step(tmp_path: Path):
    """Two steps of five, which is what there is time for; ``experiments/gpu.sh --dry`` tries all of them."""
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "unused")}
    steps = ("fold", "retrieval")
    command = [TOP / "experiments" / "gpu.sh", "--dry", "--steps", ",".join(steps), "--output", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    measured = {step: json.loads((tmp_path / f"gpu-{step}.json").read_text()) for step in steps}
    assert all(facts["dry"] and facts["failure"] is None for facts in measured.values())
    assert measured["fold"]["training_tiles"] == 64 and measured["fold"]["tiles_per_s"] > 0
    assert measured["retrieval"]["lines"]
    for step in steps:
        assert list(gpu_table.peaks_of(step, measured[step])), step
    with pytest.raises(SystemExit, match="dry"):
        results.add(tmp_path / "gpu-fold.json")


def test_every_method_is_trained_as_its_yaml_says_it_was_published():
    assert set(gpu.PUBLISHED) == {path.stem for path in (CONF / "model").glob("*.yaml")}
    published = OmegaConf.load(CONF / "sweep" / "table1.yaml")["where"]
    for method, settings in gpu.PUBLISHED.items():
        for setting in published.get(f"model={method}", []):
            assert setting in settings, method
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", gpu.train_arguments(method, "B4", Path("weights.safetensors"), False))
        assert (cfg.model.name, cfg.image_encoder.name) == (method, "densenet121")
        assert cfg.protocol.name == "paper" and cfg.trainer.accelerator == "gpu"


def test_what_fails_or_does_not_end_is_said_and_does_not_stop_the_rest(machine, monkeypatch, capfd):
    assert machine.run("good", ["-c", "print(1)"], 60) is None
    assert machine.run("bad", ["-c", "raise SystemExit('a reason')"], 60) == "failed with exit code 1"
    assert "a reason" in capfd.readouterr().err
    assert machine.run("endless", ["-c", "while True: pass"], 0.5).startswith("stopped")

    def bench(machine, step, script, arguments, limit_s):
        failure = "failed with exit code 1" if step == "train" else None
        return machine.write(step, {"lines": [], "encoder": "densenet121", "failure": failure})

    monkeypatch.setattr(gpu, "bench", bench)
    assert gpu.measure(machine, ["train", "predict", "retrieval"], jobs=1) == 1
    assert "NOT MEASURED: train\n" in capfd.readouterr().out
    written = json.loads((machine.output / "gpu-retrieval.json").read_text())
    assert (written["failure"], written["gpu"], written["commit"]) == (None, ["Some card"], "abc")


def test_what_ended_meanwhile_need_not_be_ended(machine):
    process = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    process.wait()
    machine.processes.add(process.pid)  # as a signal between its end and its being taken off the list finds it
    with pytest.raises(SystemExit) as ended:
        machine.end(15, None)
    assert ended.value.code == 143 and machine.left_s < 0


def test_runs_for_which_no_time_is_left_are_counted_and_no_failure(machine, monkeypatch):
    machine.deadline, machine.dry = time.monotonic() - 1, False
    monkeypatch.setattr(gpu, "train_run", lambda *_: pytest.fail("nothing is to be begun"))
    facts = gpu.other_runs(machine, {}, jobs=2)
    n = len(gpu.SECTIONS) * len(gpu.PUBLISHED) - 1
    assert facts["failure"] is None and len(facts["not_measured"]) == n
    assert [line.value for line in gpu_table.lines_of("runs", facts)] == [str(n)]


def test_a_wheel_of_imagecodecs_keeps_what_is_called_and_what_that_links(tmp_path: Path):
    wheel = tmp_path / "imagecodecs-1-cp311-abi3-any.whl"
    members = {
        "imagecodecs/__init__.py": b"# libunused.so.1",
        "imagecodecs/_jpeg8.abi3.so": b"ELF libjpeg.so.8",
        "imagecodecs/_avif.abi3.so": b"ELF libavif.so.16",
        "imagecodecs.libs/libjpeg.so.8": b"ELF libz.so.1",
        "imagecodecs.libs/libz.so.1": b"ELF",
        "imagecodecs.libs/libavif.so.16": b"ELF",
        "imagecodecs.libs/libunused.so.1": b"ELF",
        "imagecodecs-1.dist-info/RECORD": b"imagecodecs/_avif.abi3.so,,\n",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    gpu_pack.prune_imagecodecs(wheel)
    site = tmp_path / "site"
    assert gpu.install(tmp_path, site) == [wheel.name]
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert files == {name for name in members if "avif" not in name and "unused" not in name}
    rows = list(csv.reader(io.StringIO((site / "imagecodecs-1.dist-info" / "RECORD").read_text())))
    assert {row[0] for row in rows} == files
    digest = base64.urlsafe_b64encode(hashlib.sha256(members["imagecodecs/_jpeg8.abi3.so"]).digest()).decode()
    assert ["imagecodecs/_jpeg8.abi3.so", "sha256=" + digest.rstrip("="), "16"] in rows


def test_packages_of_a_machine_are_read_from_names_or_a_freeze(tmp_path: Path):
    freeze = tmp_path / "freeze.txt"
    freeze.write_text("# a machine\nPyYAML==6.0.3\nscikit_learn>=1.5\n\ntorch @ file:///x.whl\nzope.interface\n")
    assert gpu_pack.read_names(freeze) == {"pyyaml", "scikit-learn", "torch", "zope-interface"}


def test_data_that_lacks_a_file_is_refused_by_its_name(tmp_path: Path):
    with pytest.raises(SystemExit, match=r"C3_selection\.tsv"):
        gpu_pack.copy_data(tmp_path, tmp_path / "pack")


def test_the_page_says_what_was_not_measured_and_what_missed_its_aim(tmp_path: Path):
    assert gpu_table.readme(tmp_path).count("| not measured |") == 7
    line = {"name": "(a) training step", "ratio": 0.5, "bound": 0.95}
    peak = {"ours": {"peak_gpu_memory_gb": 12.34}, "bare": {"peak_gpu_memory_gb": 1.0}}
    facts = {"gpu": ["Some card"], "lines": [line], "peak_memory": peak, "failure": None}
    (tmp_path / "gpu-train.json").write_text(json.dumps(facts))
    page = gpu_table.readme(tmp_path)
    assert "| training step | 0.50 | >= 0.95, **missed** | 12.3 GB | Some card" in page
    assert page.count("| not measured |") == 5


def test_a_machine_that_lacks_something_is_left_with_all_of_it_named(machine, monkeypatch):
    answer(monkeypatch, missing={"hydra": "no module", "anndata": "too old"})
    with pytest.raises(SystemExit, match=r"(?s)hydra: no module.*anndata: too old.*--have"):
        gpu.inspect_machine(machine)
    answer(monkeypatch, commit=None, dirty=None)
    machine.dry = False
    with pytest.raises(SystemExit, match="no GPU"):
        gpu.inspect_machine(machine)


@pytest.mark.parametrize(("digest", "commit"), [(gpu.source_digest(), "abc"), ("of other code", None)])
def test_a_copy_without_git_has_the_commit_of_its_pack_if_it_is_the_same_code(machine, monkeypatch, digest, commit):
    machine.pack.mkdir()
    machine.dry = False
    pack = {"digest": digest, "commit": "abc", "dirty": False, "python": "{}.{}".format(*sys.version_info)}
    (machine.pack / "pack.json").write_text(json.dumps(pack))
    answer(monkeypatch, gpu=["Some card"], commit=None, dirty=None)
    gpu.inspect_machine(machine)
    assert machine.facts["commit"] == commit


def test_a_folder_that_is_no_pack_or_for_another_python_is_refused(tmp_path: Path):
    with pytest.raises(SystemExit, match="no folder that"):
        gpu.read_pack(tmp_path)
    (tmp_path / "pack.json").write_text(json.dumps({"python": "2.7"}))
    with pytest.raises(SystemExit, match=r"Python 2\.7"):
        gpu.read_pack(tmp_path)


def answer(monkeypatch, **facts):
    """What the machine says of itself when it is asked."""
    done = subprocess.CompletedProcess([], 0, stdout=f"a line of another package\n{json.dumps(facts)}\n", stderr="")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: done)
