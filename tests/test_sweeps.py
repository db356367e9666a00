"""Sweeps: what they consist of, what they share, and that their jobs run as they should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from stexp.cli import job as process_of_job
from stexp.cli.train import main
from stexp.config import build, command, dataset_of, to_plain
from stexp.config.compose import compose
from stexp.errors import InputError
from stexp.runs.folder import RESULTS, config_of_run
from stexp.sweeps import launching, plan, schedule
from stexp.sweeps.choice import choose
from stexp.sweeps.failure import Failure, cause_of, write_failure
from stexp.sweeps.jobs import Job, jobs, with_needs
from stexp.sweeps.launching import starter, sweep
from stexp.sweeps.local import Local, gpu_slots, visible_gpus
from stexp.sweeps.names import NOT_IN_NAME
from stexp.sweeps.preview import preview
from stexp.sweeps.schedule import Slot, run
from stexp.sweeps.settings import flat


def finish(folder: Path, **files: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*RESULTS, "metrics.json"):
        (folder / name).write_text(json.dumps(files.get(name.removesuffix(".json"), {})))


def settings_of_run(config: dict) -> dict:
    """Dotted key -> value, without what is of one fold or folder."""
    of_one = ("fold", "seed", "output_dir", "logger.", "callbacks.")
    return {key: value for key, value in flat(config).items() if not key.startswith(of_one)}


# what a sweep consists of


@pytest.mark.parametrize(
    ("name", "overrides", "folders"),
    [
        (
            "table1",
            ["fold=B4,CID4290,P2_ST_rep1", "model=mclstexp,stnet"],
            [
                "runs/her2st-paper/mclstexp/B4-s0",
                "runs/her2st-paper/stnet-augmentation_dihedral-batch_size_32-max_epochs_50/B4-s0",
                "runs/cscc-paper/mclstexp-protocol.k_600/P2_ST_rep1-s0",
                "runs/cscc-paper/stnet-augmentation_dihedral-batch_size_32-max_epochs_50/P2_ST_rep1-s0",
                "runs/alex10x-paper/mclstexp-max_epochs_15/CID4290-s0",
                "runs/alex10x-paper/stnet-batch_size_32-max_epochs_50/CID4290-s0",
            ],
        ),
        (
            "tableS5",
            ["fold=C", "protocol=strict", "data=her2st", "image_encoder=vit_b32", "seed=3", "output_dir='a b/r'"],
            ["a b/r/her2st-strict/mclstexp-image_encoder_vit_b32/C-s3"],
        ),
        (
            "search",
            ["fold=B", "model.lr=1e-05", "model.embedding_dim=128", "model.weight_decay=0.01"],
            ["runs/her2st-strict/mclstexp-embedding_dim_128-lr_1e-05-weight_decay_0.01/B-s0"],
        ),
        (
            "tableS2",
            ["fold=B4", "data.sections=[B4,C2]", "data.panel_file=/x/y/z.txt", "data.stain=macenko"],
            ["runs/her2st-paper/mclstexp-panel_file_z.txt.9a9a87ec-sections_B4+C2-stain_macenko/B4-s0"],
        ),
        (
            "figS4",
            ["fold=B4", "data=her2st", "model.k=50"],
            ["runs/her2st-paper/mclstexp/B4-s0/rescored/k=50"],
        ),
    ],
)
def test_folders_are_named_as_those_of_recorded_runs(name, overrides, folders):
    assert [str(job.output_dir) for job in jobs(name, overrides)] == folders


def test_long_names_are_cut_and_kept_apart():
    long = [f"data.panel_file=/x/{'y' * 110}{i}.txt" for i in range(2)]
    names = [jobs("tableS2", ["fold=B4", text])[0].output_dir.parent.name for text in long]
    assert len(set(names)) == 2 and all(
        len(name) <= 120 and name.startswith("mclstexp-panel_file_yyy") for name in names
    )


@pytest.mark.slow
def test_a_folder_is_one_run_in_every_sweep_and_a_run_one_folder():
    folder_of, config_of = defaultdict(set), defaultdict(set)
    for name in ("table1", "tableS4", "tableS7"):
        for job in jobs(name):
            config = {key: value for key, value in flat(job.settings).items() if not key.startswith(NOT_IN_NAME)}
            what = (json.dumps(config, sort_keys=True), job.fold, job.seed)
            folder_of[what].add(job.output_dir)
            config_of[job.output_dir].add(what)
    assert all(len(folders) == 1 for folders in folder_of.values())
    assert all(len(configs) == 1 for configs in config_of.values())


@pytest.mark.slow
def test_the_main_runs_are_trained_once_for_all_tables():
    main_runs = {job.output_dir for job in jobs("table1", ["model=mclstexp"])}
    assert len(main_runs) == 53
    for name, axis, value in (
        ("tableS4", "model.position", "learnable"),
        ("tableS5", "image_encoder", "densenet121"),
        ("tableS6", "model.distance", "l1"),
        ("tableS7", "model.image_weight", "0.5"),
    ):
        assert {job.output_dir for job in jobs(name) if job.cell[axis] == value} == main_runs
    for name in ("tableS6", "figS2", "figS4"):  # and nothing else is trained
        assert {job.output_dir for job in with_needs(jobs(name)) if job.command == "train"} == main_runs


@pytest.mark.parametrize("name", ["table1", "tableS5"])
def test_the_command_of_a_job_gives_its_settings_and_folder(name):
    last = {tuple(job.cell.values()): job for job in jobs(name, ["output_dir='x (1)/runs'", "trainer.max_epochs=2"])}
    for job in [*last.values()][::4]:
        cfg = compose("train", job.overrides)
        assert Path(cfg.output_dir) == job.output_dir and job.output_dir.parts[:2] == ("x (1)", "runs")
        assert (cfg.fold, cfg.seed) == (job.fold, job.seed)
        assert settings_of_run(OmegaConf.to_container(cfg, resolve=True)) == settings_of_run(job.settings)
        assert cfg.trainer.max_epochs == 2


def test_what_is_corrected_is_not_retrieved_again_beside_it(monkeypatch):
    few = ["model.correct=true", "data=her2st", "fold=B4"]
    with pytest.raises(InputError, match=r"^model\.correct=true: model\.k=50 .*model\.correct=false would fit.*$"):
        jobs("figS4", few)
    (same,) = jobs("tableS6", [*few, "model.distance=l1"])
    assert same.command == "train" and same.needs is None and "correct_True" in same.output_dir.parent.name
    read_plan = plan.read_plan
    axis = {"rescore": {"model.weighting": ["inverse_square", "similarity"]}}
    monkeypatch.setattr(plan, "read_plan", lambda name: read_plan(name) | axis)
    with pytest.raises(InputError, match=r"model\.weighting=inverse_square"):  # as the config has it, unused
        jobs("tableS6", few)
    assert [job.command for job in jobs("tableS6", [*few, "model.weighting=similarity"])] == ["train"]
    assert [job.command for job in jobs("tableS6", few[1:])] == ["train", "score"]


def test_values_on_the_command_line_take_the_place_of_the_sweeps():
    assert {job.model for job in jobs("table1", ["model=bleep,stnet", "data=cscc"])} == {"bleep", "stnet"}
    cells = jobs("figS4", ["model.k=20,30", "data=her2st", "fold=C2,B4", "seed=range(2)"])
    assert [(job.cell["model.k"], job.fold, job.seed) for job in cells] == [
        (k, fold, seed) for seed in (0, 1) for fold in ("B4", "C2") for k in ("20", "30")
    ]
    assert all(job.needs.output_dir == job.output_dir.parents[1] for job in cells)
    more = jobs("tableS2", ["data.stain=null,macenko", "fold=B4"])
    assert [job.output_dir.parent.name for job in more] == ["mclstexp", "mclstexp-stain_macenko"]


def test_folds_are_those_of_the_sections_that_are_there_and_patients_under_strict():
    few = ["data.sections=[B4,C2,P2_ST_rep1]", "model=bleep"]
    found = jobs("table1", few)
    assert [(job.data, job.fold) for job in found] == [("her2st", "B4"), ("her2st", "C2"), ("cscc", "P2_ST_rep1")]
    assert [job.settings["data"]["sections"] for job in found] == [["B4", "C2"]] * 2 + [["P2_ST_rep1"]]
    strict = jobs("table1", [*few, "protocol=strict"])
    assert [(job.data, job.fold) for job in strict] == [("her2st", "B"), ("her2st", "C"), ("cscc", "P2")]
    assert not {job.output_dir for job in found} & {job.output_dir for job in strict}
    assert [job.fold for job in jobs("figS3", ["protocol=strict", "model=bleep"])] == ["B", "C", "D", "E", "F", "G"]
    assert [job.fold for job in jobs("tableS2", ["protocol=blocks"])] == ["block1", "block2", "block3", "block4"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data.sections=[B4,X9]"], "data.sections: X9 is in none of the data sets of sweep=table1"),
        (["fold=B4,Z"], "fold: Z is in none of the data sets"),
        (["model.lrr=1"], "there is no key model.lrr; did you mean model.lr?"),
        (["model=mclstex"], "did you mean mclstexp?"),
        (["model.lr=interval(0,1)"], "give a list of values"),
        (["model.image_weight"], "is no key=value"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments, says):
    with pytest.raises(InputError) as caught:
        jobs("table1", arguments)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_sweep_is_said_with_those_there_are():
    with pytest.raises(InputError, match=r"sweep=table9: choose figS1, .*, table1, tableS2"):
        jobs("table9")


def test_the_folds_known_beforehand_are_those_of_the_readers(tmp_path):
    from fakes import alex10x, cscc

    for name, fake in (("cscc", cscc), ("alex10x", alex10x)):
        fake.write(tmp_path / name)
        cfg = compose("train", [f"data={name}", f"data.root={tmp_path / name}", f"data.cache_dir={tmp_path}/cache"])
        listed = {section: patient for patient, of in cfg.data.sections_of.items() for section in of}
        read = dataset_of(cfg).read_sections(build(cfg.protocol))
        assert read and all(listed[section.name] == section.patient for section in read)


@pytest.mark.data
def test_the_folds_of_her2st_are_those_of_its_files(real_data):
    cfg = compose("train", ["data=her2st", f"data.root={real_data / 'her2st'}"])
    read = {
        path.name.split(".")[0]: path.name[0] for path in sorted((real_data / "her2st" / "ST-cnts").glob("*.tsv.gz"))
    }
    assert {section: patient for patient, of in cfg.data.sections_of.items() for section in of} == read
    assert set(cfg.data.published_sections) <= set(read)


def test_lists_of_values_without_a_sweep_go_where_the_config_says(tmp_path):
    made = jobs(None, ["data=her2st", "protocol=paper", "fold=all", "seed=0,1", f"output_dir={tmp_path}/x-s${{seed}}"])
    assert len(made) == 64 and made[0].output_dir == tmp_path / "x-s0" / "A2"
    named = jobs(None, ["data=her2st", "model.k=5,6", "fold=C", "output_dir='runs/${model.k}-${fold}'"])
    assert [str(job.output_dir) for job in named] == ["runs/5-C", "runs/6-C"]
    assert [compose("train", job.overrides).model.k for job in named] == [5, 6]
    with pytest.raises(InputError, match=r"two jobs would write into runs/.*output_dir='runs/\$\{model.k\}-\$\{fold\}"):
        jobs(None, ["data=her2st", "model.k=5,6", "fold=C"])


@pytest.mark.parametrize("fold", ["fold=C1", "fold=all", "seed=0,1"])
def test_a_finished_run_with_other_settings_is_none_of_these(tmp_path, fold, capsys):
    line = [
        "data=her2st",
        "protocol=paper",
        "fold=B1",
        "model=bleep",
        fold,
        f"output_dir={tmp_path}/r-${{fold}}-s${{seed}}",
    ]
    for job in jobs(None, line):
        job.output_dir.mkdir(parents=True)
        config = config_of_run(to_plain(compose("train", job.overrides)))  # as a training writes it
        (job.output_dir / "config.yaml").write_text(yaml.safe_dump(config))
        for name in (*RESULTS, "metrics.json"):
            (job.output_dir / name).touch()
    assert sweep([*line, "dry_run=true"]) == 0 and ", 0 to do" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"a run with another config \(trainer.max_epochs\).*overwrite=true"):
        sweep([*line, "trainer.max_epochs=2", "dry_run=true"])
    assert sweep([*line, "trainer.max_epochs=2", "overwrite=true", "dry_run=true"]) == 0
    assert ", 0 done" in capsys.readouterr().out


def test_what_is_retrieved_again_is_where_stexp_score_puts_it():
    from stexp.runs.rescore import folder_name

    again = next(job for job in jobs("figS4", ["data=her2st"]) if job.command == "score")
    assert again.output_dir == again.needs.output_dir / "rescored" / folder_name({"k": int(again.cell["model.k"])})
    assert again.typed == f"stexp-score run={again.needs.output_dir} model.k={again.cell['model.k']}"


# how jobs run


@dataclass(frozen=True, eq=False)
class Fake(Job):
    """A job that runs some Python in place of a command."""

    code: str = field(default="", kw_only=True)

    @property
    def arguments(self) -> list[str]:
        return [sys.executable, "-S", "-c", self.code, str(self.output_dir)]


FINISH = f"""
import sys, pathlib
folder = pathlib.Path(sys.argv[1])
for name in {[*RESULTS, "metrics.json"]}: (folder / name).write_text('{{}}')
"""


RECORD = """
import json, sys, pathlib
record = {"kind": "InputError", "message": "no such gene", "exit": 2}
(pathlib.Path(sys.argv[1]) / "logs" / "failure.json").write_text(json.dumps(record))
print("stexp: error: something else")
sys.exit(2)"""


def fake(folder: Path, code: str = FINISH, needs: Job | None = None) -> Fake:
    settings = {"trainer": {"devices": 1, "accelerator": "auto", "max_epochs": 90}, "overwrite": False}
    what = ("her2st", "paper", "mclstexp", folder.name, 0, {})
    return Fake("train", (f"fold={folder.name}",), folder, *what, settings, needs, code=code)


class Clocked:
    """A job that takes so many looks at it."""

    now = 0

    def __init__(self, job: Job, length: int) -> None:
        self.job, self.until = job, Clocked.now + length

    def poll(self) -> int | None:
        if Clocked.now < self.until:
            return None
        finish(self.job.output_dir)
        return 0


def test_each_device_has_one_job_and_the_next_goes_to_whichever_frees_first(tmp_path, monkeypatch):
    def tick(_seconds: float) -> None:
        Clocked.now += 1

    monkeypatch.setattr(schedule, "time", SimpleNamespace(sleep=tick, monotonic=time.monotonic))
    lengths = {"a": 9, "b": 2, "c": 3, "d": 1, "e": 4}
    Clocked.now, started, children = 0, [], []

    def start(job: Job, slot: Slot) -> Clocked:
        busy = [other for device, other in children if device == slot.environment["CUDA_VISIBLE_DEVICES"]]
        assert all(other.until <= Clocked.now for other in busy), "two jobs on one device"
        child = Clocked(job, lengths[job.output_dir.name])
        children.append((slot.environment["CUDA_VISIBLE_DEVICES"], child))
        started.append((Clocked.now, job.output_dir.name, slot.environment["CUDA_VISIBLE_DEVICES"]))
        return child

    slots = gpu_slots(["3", "7"], None, 1)
    assert run([fake(tmp_path / name) for name in lengths], start, slots) == {}
    assert started == [(0, "a", "3"), (0, "b", "7"), (2, "c", "7"), (5, "d", "7"), (6, "e", "7")]


def test_jobs_run_at_the_same_time_on_devices_of_their_own_and_never_two_on_one(tmp_path):
    meet = f"""
import os, sys, time, pathlib
here = pathlib.Path({str(tmp_path)!r})
device = here / ("device-" + os.environ["CUDA_VISIBLE_DEVICES"])
os.close(os.open(device, os.O_CREAT | os.O_EXCL))  # fails where another has it
(here / ("met-" + os.environ["CUDA_VISIBLE_DEVICES"])).touch()
until = time.monotonic() + 60
while len(list(here.glob("met-*"))) < 2:  # passed only with the other at work
    if time.monotonic() > until: sys.exit(3)
    time.sleep(0.01)
device.unlink()
{FINISH}"""
    members = [fake(tmp_path / name, meet) for name in "abcde"]
    slots = gpu_slots(["0", "1"], None, 1)
    start = lambda job, slot: Local(job, slot.environment)  # noqa: E731
    assert run(members, start, slots) == {}
    assert all(job.done for job in members) and not list(tmp_path.glob("device-*"))


def test_a_failed_job_stops_only_what_needs_it_and_what_is_done_is_not_run_again(tmp_path, caplog):
    bad = fake(tmp_path / "bad", RECORD)
    half = fake(tmp_path / "half", "pass")  # ends well, without results
    good = fake(tmp_path / "good")
    members = [bad, half, good, fake(tmp_path / "after-bad", needs=bad), fake(tmp_path / "after-good", needs=good)]
    start = lambda job, slot: Local(job, {})  # noqa: E731
    failed = run(members, start, [Slot()])
    assert set(failed) == {tmp_path / "bad", tmp_path / "half", tmp_path / "after-bad"}
    assert str(failed[tmp_path / "bad"]) == f"no such gene ({tmp_path / 'bad/logs/job.log'})"
    assert "without its results" in str(failed[tmp_path / "half"])
    assert "it needs" in str(failed[tmp_path / "after-bad"]) and not (tmp_path / "after-bad").exists()
    assert (tmp_path / "bad/logs/job.log").read_text().startswith("$ stexp-train fold=bad\n")

    ran = []
    mended = [replace(job, code=FINISH) for job in members]
    mended[3], mended[4] = replace(mended[3], needs=mended[0]), replace(mended[4], needs=mended[2])

    def noting(job: Job, slot: Slot) -> Local:
        ran.append(job.output_dir.name)
        return Local(job, {})

    assert run(mended, noting, [Slot()]) == {}
    assert ran == ["bad", "half", "after-bad"]
    assert not (tmp_path / "bad/logs/failure.json").exists(), "of an attempt before"
    assert run(mended, noting, [Slot()]) == {} and len(ran) == 3
    run(mended, noting, [Slot()], anew=True)
    assert len(ran) == 8


def test_a_job_that_is_killed_or_only_has_a_status_is_said_to_be(tmp_path):
    assert "SIGKILL" in str(cause_of(tmp_path, -signal.SIGKILL))
    assert "7" in str(cause_of(tmp_path, 7))


def raising(error: BaseException):
    """A command's main that ends with an error, as commands do."""

    def main() -> None:
        with command():
            raise error

    return main


@pytest.mark.parametrize(
    ("error", "kind", "status", "says"),
    [
        (InputError("no such gene"), "InputError", 2, "no such gene"),
        (OSError(28, "No space left on device", "x.h5ad"), "OSError", 2, "No space left on device"),
        (KeyboardInterrupt(), "KeyboardInterrupt", 130, ""),
        (ZeroDivisionError("two\nlines"), "ZeroDivisionError", 1, "two lines"),
        (SystemExit(3), "SystemExit", 3, "3"),
        (SystemExit(0), None, 0, ""),
    ],
)
def test_a_job_records_why_it_failed(error, kind, status, says, tmp_path, monkeypatch):
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)  # its handler would outlive the captured stream
    monkeypatch.setattr("importlib.import_module", lambda name: SimpleNamespace(main=raising(error)))
    monkeypatch.setattr(sys, "argv", ["job"])
    with pytest.raises(type(error) if kind == "ZeroDivisionError" else SystemExit):
        process_of_job.main(str(tmp_path), "train", ["fold=A"])
    assert sys.argv == ["stexp-train", "fold=A"]
    if kind is None:
        assert not (tmp_path / "failure.json").exists()
        return
    record = json.loads((tmp_path / "failure.json").read_text())
    assert (record["kind"], record["exit"]) == (kind, status) and says in record["message"]
    assert record["message"] in str(cause_of(tmp_path, status))


@pytest.fixture
def slow_import(tmp_path) -> dict[str, str]:
    """Environment of a job that never gets past importing, and holds a file meanwhile as a run holds its folder."""
    (tmp_path / "slow" / "hydra").mkdir(parents=True)
    (tmp_path / "slow" / "hydra" / "__init__.py").write_text(
        "import os, time\nfrom filelock import FileLock\nheld = FileLock(os.environ['HELD'])\nheld.acquire()\n"
        "open(os.environ['HELD'] + '.began', 'w').close()\nwhile True: time.sleep(1)\n"
    )
    path = os.pathsep.join([str(tmp_path / "slow"), *sys.path])
    return {"PYTHONPATH": path, "HELD": str(tmp_path / "held")}


def start_job(arguments: list[str], environment: dict[str, str], parent: int) -> subprocess.Popen:
    environment = {**os.environ, **environment, "STEXP_PARENT": str(parent)}
    return subprocess.Popen([sys.executable, *arguments], stdin=subprocess.PIPE, env=environment)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)


def test_a_job_that_still_imports_ends_with_a_sweep_that_is_killed(tmp_path, slow_import):
    start = f"""
import sys
from pathlib import Path
from stexp.sweeps.local import start_process
arguments = [sys.executable, "-m", "stexp.cli.job", sys.argv[1], "train"]
job = start_process(arguments, "typed", Path(sys.argv[1]), {slow_import!r})
sys.stdin.read()"""
    sweep = subprocess.Popen([sys.executable, "-c", start, str(tmp_path / "logs")], stdin=subprocess.PIPE)
    wait_for(tmp_path / "held.began", sweep)
    held = FileLock(tmp_path / "held")
    with pytest.raises(Timeout):
        held.acquire(timeout=0)
    sweep.kill()
    held.acquire(timeout=30)  # by the same command again
    held.release()
    sweep.communicate()


def test_a_job_whose_sweep_is_gone_before_it_looks_does_not_begin(tmp_path, slow_import):
    with start_job(["-m", "stexp.cli.job", str(tmp_path), "train"], slow_import, parent=0) as process:
        assert process.wait(30) == 1
    assert not (tmp_path / "held.began").exists()


def test_a_job_ends_with_its_sweep_where_the_kernel_does_not_end_it(tmp_path, slow_import):
    without = (
        "import ctypes, runpy, types\nctypes.CDLL = lambda name: types.SimpleNamespace(prctl=lambda *_: -1)\n"
        "runpy.run_module('stexp.cli.job', run_name='__main__')"
    )
    with start_job(["-c", without, str(tmp_path), "train"], slow_import, parent=os.getpid()) as process:
        wait_for(tmp_path / "held.began", process)
        process.stdin.close()
        assert process.wait(30) == 1


def test_an_interrupted_sweep_ends_its_jobs(tmp_path, monkeypatch):
    endless = """
import pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored, where this test was started with &
(pathlib.Path(sys.argv[1]) / 'began').touch()
while True: time.sleep(1)"""
    started = []

    def start(job: Job, slot: Slot) -> Local:
        started.append(Local(job, {}))
        return started[-1]

    interruptions = iter([KeyboardInterrupt])

    def interrupted(_seconds: float) -> None:
        if all((tmp_path / name / "began").exists() for name in "ab"):
            raise next(interruptions, ValueError)

    monkeypatch.setattr(schedule, "time", SimpleNamespace(sleep=interrupted, monotonic=time.monotonic))
    with pytest.raises(KeyboardInterrupt):
        run([fake(tmp_path / name, endless) for name in "abc"], start, [Slot(), Slot()])
    assert [child.process.returncode for child in started] == [-signal.SIGINT] * 2
    assert not (tmp_path / "c").exists()


def test_a_stubborn_job_is_ended_by_force(tmp_path, monkeypatch):
    deaf = """
import signal, sys, time, pathlib
signal.signal(signal.SIGINT, signal.SIG_IGN)
(pathlib.Path(sys.argv[1]) / 'began').touch()
while True: time.sleep(1)"""
    child = Local(fake(tmp_path / "deaf", deaf), {})
    while not (tmp_path / "deaf" / "began").exists():
        assert child.poll() is None
    child.interrupt()
    child.end(0.1)
    assert child.process.returncode == -signal.SIGKILL


def test_devices_are_those_that_this_process_may_use(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA A100 (UUID: GPU-1)'\necho '  MIG 1g.5gb Device 0: (UUID: MIG-2)'\n"
        "echo 'GPU 1: NVIDIA A100 (UUID: GPU-3)'\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    for told, there in (("2,GPU-9", ["2", "GPU-9"]), ("", []), ("-1", []), ("1,-1,2", ["1"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
        assert visible_gpus() == there


def test_two_jobs_share_a_device_only_where_asked():
    def names(*arguments) -> list[str]:
        return [slot.environment.get("CUDA_VISIBLE_DEVICES") for slot in gpu_slots(*arguments)]

    assert names(["0", "1"], None, 1) == ["0", "1"]
    assert names(["0", "1"], None, 2) == ["0", "1", "0", "1"]
    assert names(["0", "1", "2"], [2, 2], 1) == ["2"]
    assert names([], None, 1) == [None]
    for there, wanted, n, says in (
        (["0"], [1], 1, "1 asked for, and there are 0"),
        ([], [0], 1, "0 asked for, and there are none"),
        (["0"], None, 0, "jobs_per_gpu=0"),
    ):
        with pytest.raises(InputError, match=says):
            gpu_slots(there, wanted, n)


def test_slurm_gets_every_job_with_its_resources(tmp_path, monkeypatch):
    """Without submitit: what it is given is recorded, and run at once."""
    given = []

    class Executor:
        def __init__(self, folder: Path, cluster: str) -> None:
            given.append((folder, cluster))

        def update_parameters(self, **parameters) -> None:
            given.append(parameters)

        def submit(self, function, *arguments):
            error = None
            try:
                function(*arguments)
            except Exception as raised:
                error = raised
            return type("Submitted", (), {"done": lambda _: True, "exception": lambda _: error})()

    monkeypatch.setitem(sys.modules, "submitit", type("submitit", (), {"AutoExecutor": Executor}))
    overrides = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "+hydra.launcher.additional.qos=long"]
    launcher = compose("train", overrides, with_hydra=True).hydra.launcher
    members = [fake(tmp_path / "a"), fake(tmp_path / "b", "raise SystemExit(2)")]
    start, slots = starter(to_plain(launcher), members, "table1")
    assert set(run(members, start, slots)) == {tmp_path / "b"}
    assert given[0] == (tmp_path / "a" / "logs" / "submitit", "slurm")
    assert given[1]["slurm_partition"] == "gpu" and given[1]["gpus_per_node"] == 1
    assert given[1]["slurm_additional_parameters"] == {"qos": "long"} and "slurm_account" not in given[1]


@pytest.mark.slow
def test_ray_finishes_jobs_beside_failing_killed_and_waiting_ones(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    launcher = to_plain(compose("train", ["hydra/launcher=ray"], with_hydra=True).hydra.launcher)
    in_place = f"import os\nassert os.path.basename(os.getcwd()) == os.environ['STEXP_SWEEP']\n{FINISH}"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    folder = tmp_path / "table1"
    folder.mkdir()
    monkeypatch.chdir(folder)
    members = [
        fake(folder / "a", in_place),
        fake(folder / "fails", "raise SystemExit(2)"),
        fake(folder / "killed", "import os; os.kill(os.getpid(), 9)"),
        fake(folder / "worker_killed", "import os; os.kill(os.getppid(), 9)"),
        fake(folder / "b", in_place),
    ]
    try:
        start, slots = starter(launcher, members, "table1")
        failed = run(members, start, slots)
        assert set(failed) == {folder / "fails", folder / "killed", folder / "worker_killed"}
        assert failed[folder / "fails"].is_mendable and not failed[folder / "killed"].is_mendable
        assert members[0].done and members[-1].done
        assert "died" in failed[folder / "worker_killed"].message
        monkeypatch.setattr(sys, "executable", "/no/such/python")
        absent = fake(folder / "absent")
        assert run([absent], start, slots)[absent.output_dir].kind == "FileNotFoundError"
        monkeypatch.undo()
        deaf = "import pathlib, signal, sys, time; signal.signal(2, signal.SIG_IGN); "
        deaf += "(pathlib.Path(sys.argv[1]) / 'begun').touch(); time.sleep(600)"
        task = start(fake(folder / "long", deaf), slots[0])
        while not (folder / "long" / "begun").exists():
            assert task.poll() is None
        task.interrupt()
        task.end(30)
        assert task.poll() == 1
        for key, says in (("num_gpus", "0 GPUs"), ("num_cpus", "CPUs")):
            with pytest.raises(InputError, match=says):
                starter({**launcher, key: 512}, members, None)
    finally:
        ray.shutdown()


@pytest.mark.parametrize(("ends", "status"), [((2, 2), 2), ((2, 1), 1), ((0, 2), 2), ((0, 0), 0), ((-9, 2), 1)])
def test_a_sweep_ends_with_2_where_the_user_can_mend_all(tmp_path, monkeypatch, ends, status) -> None:
    causes = (Failure("OSError", "no space", end) for end in ends if end)
    failed = dict(zip((tmp_path / "a", tmp_path / "b"), causes, strict=False))
    monkeypatch.setattr(launching, "run", lambda *_: failed)
    assert (
        launching.sweep(["data=demo", "model=stnet", "fold=A", "trainer.accelerator=cpu", f"output_dir={tmp_path}/x"])
        == status
    )


def test_a_record_that_the_disk_does_not_take_leaves_the_status(tmp_path) -> None:
    (tmp_path / "logs").write_text("in the way of a folder")
    write_failure(tmp_path / "logs", OSError(28, "No space left on device", "/x/predictions.h5ad"), 2)
    cause = cause_of(tmp_path / "logs", 2)
    assert cause.is_mendable and str(tmp_path / "logs") in str(cause)
    write_failure(tmp_path / "other", OSError(28, "No space left on device", "/x/predictions.h5ad"), 2)
    assert str(cause_of(tmp_path / "other", 2)).startswith("/x/predictions.h5ad: No space left on device")
    (tmp_path / "other" / "failure.json").write_text('{"kind": 1')
    assert "exit status 2" in str(cause_of(tmp_path / "other", 2))


def test_the_preview_says_what_is_done_and_scales_recorded_hours_by_epochs(tmp_path):
    members = jobs("tableS2", [f"output_dir={tmp_path}", "fold=B4,C2,C3"])
    text = preview(members)
    assert "3 jobs, 0 done, 3 to do: no run to go by; unknown for 3" in text
    # another setting of the method, with a tenth of the epochs: 600 s besides 3000 s of fitting
    other = jobs("tableS2", [f"output_dir={tmp_path}", "fold=B4", "trainer.max_epochs=9"])[0].output_dir
    record = {"seconds": 3600, "stages": {"fit": 3000}, "hardware": {"cpu": "abacus"}}
    finish(other, provenance=record)
    settings = to_plain(compose("train", ["data=her2st", "model=mclstexp", "fold=B4", f"output_dir={other}"]))
    settings["trainer"]["max_epochs"] = 9
    (other / "config.yaml").write_text(yaml.safe_dump(settings))
    (other / "weights").write_bytes(bytes(10_000_000))
    text = preview(members)
    assert f"{(600 + 30000) / 3600:.2f}" in text and "unknown" not in text
    assert f"3 to do: {3 * 30600 / 3600:.1f} h and 0.0 GB by runs on CPU abacus" in text
    # the same settings count alone
    finish(members[0].output_dir, provenance={**record, "seconds": 36000, "stages": {"fit": 1}})
    settings["trainer"]["max_epochs"] = 90
    (members[0].output_dir / "config.yaml").write_text(yaml.safe_dump(settings))
    text = preview(members)
    assert f"done   {members[0].output_dir}" in text and "1 done, 2 to do: 20.0 h" in text


def test_a_search_chooses_by_validation_and_not_by_the_test_spots(tmp_path):
    cells = jobs("search", [f"output_dir={tmp_path}", "fold=B,C", "model.lr=0.1,0.2", "model.embedding_dim=8"])
    assert {job.protocol for job in cells} == {"strict"} and len(cells) == 2 * 2 * 3
    for i, job in enumerate(cells):
        scores = {"pearson_acg": -float(i), "pearson_heg50": 0.0}
        finish(job.output_dir, provenance={"validation_pearson": i % 5}, metrics={"scores": scores})
    best = choose(cells, "validation_pearson")
    for _, row in best.iterrows():
        of_fold = [i for i, job in enumerate(cells) if job.fold == row["fold"]]
        first = max(of_fold, key=lambda i: (i % 5, -i))
        assert row["validation_pearson"] == first % 5 and row["pearson_acg"] == -first
        assert row["model.lr"] == cells[first].cell["model.lr"]
    assert list(best["fold"]) == ["B", "C"]
    finish(cells[0].output_dir)
    with pytest.raises(InputError, match="has no validation_pearson"):
        choose(cells, "validation_pearson")


# the command


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("model.lrr=1", "there is no key model.lrr; did you mean model.lr?"),
        ("lr=1", "there is no key lr; did you mean model.lr?"),
        ("model=stnet model.k=3", "there is no key model.k; model=bleep and "),
        ("trainer.max_epoch=1", "did you mean trainer.max_epochs?"),
        ("modell=x", "did you mean model?"),
        ("model=foo", "model=foo: choose "),
        ("seed=0,1", "several values need -m"),
        ("sweep=table1", "sweep= belongs to a sweep: stexp-train -m sweep=table1"),
        ("fold", "fold is no key=value"),
        ("-m sweep=table1 model.lrr=1", "did you mean model.lr?"),
        ("-m sweep=table1 trainer.devices=2", "a job of a sweep has one device"),
        ("-m sweep=table1 hydra.launcher.gpus=[99]", "99 asked for"),
        ("-m sweep=table1,tableS2", "give one sweep=NAME"),
    ],
)
def test_the_command_says_in_one_line_what_does_not_fit(line, says, monkeypatch, capsys):
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)  # its handler would outlive the captured stream
    monkeypatch.setattr(sys, "argv", ["stexp-train", *line.split()])
    with pytest.raises(SystemExit) as caught:
        main()
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("stexp: error: ") and says in error
    assert error.count("\n") == 1


def test_dry_run_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    line = ["-m", "sweep=tableS6", "data=cscc", f"output_dir={tmp_path}/runs", "dry_run=true"]
    monkeypatch.setattr(sys, "argv", ["stexp-train", *line])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0 and "36 jobs, 0 done, 36 to do" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_sweep_runs_end_to_end_and_a_second_time_does_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    caplog.set_level("INFO")
    demo = ["data=demo", f"data.root={tmp_path}/demo", f"data.cache_dir={tmp_path}/cache", "data.reader.patients=2"]
    few = ["data.reader.sections_per_patient=1", "protocol.k=20", "trainer.max_epochs=1", "trainer.accelerator=cpu"]
    line = ["sweep=tableS6", *demo, *few, f"output_dir={tmp_path}/runs", "fold=A1", "model.distance=l1,l2"]
    assert sweep(line) == 0
    cells = jobs("tableS6", line[1:])
    assert [job.command for job in cells] == ["train", "score"] and all(job.done for job in cells)
    config = OmegaConf.load(cells[0].output_dir / "config.yaml")
    assert "sweep" not in config and config.fold == "A1", "the same run for whichever sweep"
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    caplog.clear()
    assert sweep(line) == 0 and "2 jobs, 2 of them done" in caplog.text
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
