"""Measure on one GPU what only a GPU can tell, in one go: ``experiments/gpu.sh FOLDER``, or ``--dry`` on a CPU.

FOLDER is what ``experiments/gpu.sh pack`` wrote. Steps come in the order of their worth, each under a limit of its own
and in processes of its own, and each leaves a JSON at once:

    train      DenseNet-121's training step against the bare encoder, and against the published style
    fold       a fold of the paper's protocol, 90 epochs, from files to scores
    predict    tiles of a slide of 60,000 px through DenseNet-121, and through a ViT-L of random weights
    retrieval  among a million references
    runs       the other folds, then the other methods at their published epochs, as far as the time goes

Peak memory stands in each. What failed or was stopped is named at the end, with exit code 1; the others still run.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import of_paper
import results
from gpu_machine import NOT_CALLED, SECTIONS, source_digest
from gpu_table import NO_TIME, PEAKS, lines_of, scores, summary

TOP = Path(__file__).resolve().parents[1]
WEIGHTS = "densenet121.safetensors"
LEAST_S = 20  # a run that has less is not begun

PUBLISHED: dict[str, tuple[str, ...]] = {
    "mclstexp": ("trainer.max_epochs=90",),
    "mean": (),
    "hest_ridge": (),
    "consensus": ("image_encoder.frozen=true",),
    "stnet": ("data.batch_size=32", "data.augmentation=dihedral", "trainer.max_epochs=50"),
    "bleep": ("data.augmentation=dihedral", "trainer.max_epochs=90"),
    "heclip": ("data.augmentation=dihedral", "trainer.max_epochs=15"),
    "stgchb": ("data.augmentation=none", "trainer.max_epochs=30"),
    "mclstexp_plus": ("image_encoder.frozen=true", "data.augmentation=none", "trainer.max_epochs=10"),
    "triplex": ("data.augmentation=dihedral", "trainer.max_epochs=200"),
    "deepspot": ("data.batch_size=1024", "data.augmentation=none", "trainer.max_epochs=10"),
    "histogene": ("data.augmentation=none", "trainer.max_epochs=100"),
    "m2ort": ("data.batch_size=96", "data.augmentation=dihedral", "trainer.max_epochs=200"),
    "stflow": ("data.augmentation=none", "trainer.max_epochs=1000"),
    "egn": ("data.batch_size=32", "data.tile_px=256", "data.augmentation=none", "trainer.max_epochs=50"),
    "thitogene": ("data.augmentation=none", "trainer.max_epochs=300"),
    "hist2st": ("data.augmentation=none", "trainer.max_epochs=350"),
    "sepal": ("data.batch_size=256", "data.augmentation=dihedral", "trainer.max_epochs=350"),
}
"""Method -> how long and how it was trained when published, where it was; see conf/model and conf/sweep/table1.yaml."""
WITHOUT_ENCODER = ("mean", "histogene", "thitogene", "hist2st", "m2ort")
TINY = ("data.tile_px=64", "data.batch_size=8", "protocol.k=10", "trainer.max_epochs=1", "hardware.threads=1")


def train_arguments(method: str, fold: str, weights: Path, dry: bool) -> list[str]:
    """Of stexp-train, for one method and fold of the five sections under the paper's protocol."""
    return [
        "data=her2st",
        f"data.sections=[{','.join(SECTIONS)}]",
        "data.download=never",
        "protocol=paper",
        f"fold={fold}",
        f"model={method}",
        f"trainer={'cpu' if dry else 'gpu'}",
        "image_encoder=densenet121",
        f"image_encoder.checkpoint={weights}",
        *PUBLISHED[method],
        *(TINY if dry else ()),
    ]


def run_name(method: str, fold: str) -> str:
    """As experiments/results names what it keeps."""
    return f"her2st-paper-{fold}-{method}-{'published' if method in WITHOUT_ENCODER else 'densenet121'}"


def _kill(group: int) -> None:
    """End a process with its workers; nothing where it ended meanwhile."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


@dataclass
class Machine:
    """Where commands run, and until when.

    Parameters
    ----------
    pack
        With data, weights and wheels.
    output
        For JSONs and the log.
    scratch
        For everything else; gone afterwards.
    deadline
        On the clock of ``time.monotonic``.
    """

    pack: Path
    output: Path
    scratch: Path
    deadline: float
    dry: bool
    facts: dict[str, Any] = field(default_factory=dict)
    processes: set[int] = field(default_factory=set)

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def end(self, number: int, _: object) -> None:
        """On a signal: end what runs, and begin nothing more; what was measured is written."""
        self.deadline = 0
        for group in list(self.processes):
            _kill(group)
        sys.exit(128 + number)

    def run(self, name: str, command: list[str], limit_s: float) -> str | None:
        """Run Python with arguments; None where it went well, else one line that says what happened."""
        log, limit_s = self.scratch / f"{name}.log", min(limit_s, self.left_s)
        if limit_s <= 0:
            return NO_TIME
        with log.open("wb") as file:
            options = {"stdout": file, "stderr": subprocess.STDOUT, "env": self.environment(), "cwd": TOP}
            process = subprocess.Popen([sys.executable, *command], start_new_session=True, **options)
            self.processes.add(process.pid)
            try:
                code = process.wait(limit_s)
                failure = None if code == 0 else f"failed with exit code {code}"
            except subprocess.TimeoutExpired:
                failure = f"stopped after {limit_s:.0f} s"
            finally:
                if process.poll() is None:
                    _kill(process.pid)
                    process.wait()
                self.processes.discard(process.pid)
        text = log.read_text(errors="replace")
        with (self.output / "gpu.log").open("a") as whole:
            whole.write(f"=== {name}: {failure or 'done'}\n{text}\n")
        if failure:
            print(f"--- {name}: {failure}\n{text[-3000:]}\n---", file=sys.stderr, flush=True)
        return failure

    def environment(self) -> dict[str, str]:
        paths = [str(self.scratch / "site"), str(TOP / "src"), os.environ.get("PYTHONPATH", "")]
        changed = {"PYTHONPATH": os.pathsep.join(path for path in paths if path), "PYTHONUNBUFFERED": "1"}
        changed |= {"STEXP_DATA": str(self.pack), "STEXP_CACHE": str(self.scratch / "cache"), "HF_HUB_OFFLINE": "1"}
        changed |= {"TMPDIR": str(self.scratch), "MPLCONFIGDIR": str(self.scratch)}
        if self.dry:
            changed |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return os.environ | changed

    def write(self, step: str, facts: dict[str, Any]) -> dict[str, Any]:
        """The JSON of a step, with what is known of the machine and of the code."""
        known = {key: self.facts[key] for key in ("gpu", "gpu_memory_gb", "cuda", "cpu", "cores") if key in self.facts}
        code = {key: self.facts[key] for key in ("commit", "dirty")}
        whole = of_paper.elsewhere({"step": step, **known, **facts, **code, "dry": self.dry})
        (self.output / f"gpu-{step}.json").write_text(json.dumps(whole, indent=1) + "\n")
        return whole


def read_pack(folder: Path) -> dict[str, Any]:
    """What a pack says of itself; leave where it is none, or is for another Python."""
    if not (folder / "pack.json").is_file():
        sys.exit(f"{folder} is no folder that experiments/gpu.sh pack wrote")
    pack, version = json.loads((folder / "pack.json").read_text()), "{}.{}".format(*sys.version_info)
    if pack["python"] != version:
        sys.exit(f"{folder} holds packages for Python {pack['python']}, and {sys.executable} is {version}; set PYTHON")
    return pack


def install(wheels: Path, site: Path) -> list[str]:
    """Unpack wheels of pure files into a folder for PYTHONPATH, which is all that pip would do with these."""
    site.mkdir()
    names = sorted(wheels.glob("*.whl")) if wheels.is_dir() else []
    for wheel in names:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)  # which keeps members inside
    return [wheel.name for wheel in names]


def leave_out(packages: tuple[str, ...], site: Path) -> None:
    """Make packages fail to import, as where they are not packed."""
    for name in packages:
        (site / f"{name}.py").write_text(f"raise ModuleNotFoundError('{name} is not packed')\n")


def inspect_machine(machine: Machine) -> None:
    """Import everything once; leave, naming all that lacks, before any time is spent."""
    arguments = [str(TOP / "experiments" / "gpu_machine.py"), *([str(machine.pack)] if machine.dry else [])]
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=machine.environment(), capture_output=True, text=True, timeout=180, check=False)
    if done.returncode:
        sys.exit(f"this machine cannot be used:\n{done.stderr[-3000:]}")
    facts = json.loads(done.stdout.splitlines()[-1])
    if "missing" in facts:
        lines = "\n".join(f"  {name}: {why}" for name, why in facts["missing"].items())
        sys.exit(
            f"lacking here, by {sys.executable}:\n{lines}\npack again with --have naming a `pip freeze` of this machine"
        )
    if not machine.dry and "gpu" not in facts:
        sys.exit("torch sees no GPU here; --dry checks the script on the CPU")
    if facts["commit"] is None and not machine.dry:
        packed = read_pack(machine.pack)
        if packed["digest"] == source_digest():
            facts |= {key: packed[key] for key in ("commit", "dirty")}
    machine.facts = facts


def bench(machine: Machine, step: str, script: str, arguments: list[str], limit_s: float) -> dict[str, Any]:
    """A step that a benchmark of its own measures."""
    path = machine.output / f"gpu-{step}.json"
    path.unlink(missing_ok=True)
    dry = ["--dry"] if machine.dry else []
    command = [str(TOP / "experiments" / script), *arguments, *dry, f"--output={path}"]
    failure = machine.run(step, command, machine.left_s if machine.dry else limit_s)
    measured = json.loads(path.read_text()) if path.is_file() else {"lines": []}
    return machine.write(step, measured | {"failure": failure})


def train_run(machine: Machine, method: str, fold: str, limit_s: float, threads: int | None = None) -> Any:
    """A run of stexp-train: its record, or one line that says why there is none."""
    name = run_name(method, fold)
    arguments = train_arguments(method, fold, machine.pack / WEIGHTS, machine.dry)
    arguments += [f"hardware.threads={threads}"] if threads and not machine.dry else []
    folder = machine.scratch / "runs" / name
    failure = machine.run(name, ["-m", "stexp.cli.train", *arguments, f"output_dir={folder}"], limit_s)
    if failure:
        return failure
    kept = results.record(folder)
    if kept["provenance"]["commit"] is None:
        kept["provenance"] |= {key: machine.facts[key] for key in ("commit", "dirty")}
    kept["provenance"]["weights"] = "ImageNet, rounded to float16" if not machine.dry else "random"
    return kept


def first_fold(machine: Machine, records: dict[str, Any], limit_s: float) -> dict[str, Any]:
    fold, start = SECTIONS[0], time.monotonic()
    kept = train_run(machine, "mclstexp", fold, machine.left_s if machine.dry else limit_s)
    if isinstance(kept, str):
        return machine.write("fold", {"failure": kept})
    records[run_name("mclstexp", fold)] = kept
    tiles = sum(count_spots(machine.pack, name) for name in SECTIONS if name != fold)
    stages, epochs = kept["provenance"]["stages"], kept["provenance"]["epochs"]
    facts = {"seconds": round(time.monotonic() - start, 1), "stages": stages, "training_tiles": tiles, "epochs": epochs}
    facts["tiles_per_s"] = round(tiles * epochs / stages["fit"], 1)
    facts |= {"peak_memory": {"fold": {key: kept["provenance"].get(key) for key in PEAKS}}, "record": kept}
    return machine.write("fold", facts | {"failure": None})


def count_spots(pack: Path, section: str) -> int:
    with gzip.open(pack / "her2st" / "ST-cnts" / f"{section}.tsv.gz", "rt") as lines:
        return sum(1 for _ in lines) - 1


def other_runs(machine: Machine, records: dict[str, Any], jobs: int) -> dict[str, Any]:
    """The other folds, then every other method, on the first fold before the others; several at a time."""
    wanted = [("mclstexp", fold) for fold in SECTIONS[1:]]
    wanted += [(method, fold) for fold in SECTIONS for method in PUBLISHED if method != "mclstexp"]
    wanted = [("mean", SECTIONS[0])] if machine.dry else wanted
    failures: dict[str, str] = {}
    lock = threading.Lock()

    def measure(job: tuple[str, str]) -> None:
        name = run_name(*job)
        short = machine.left_s < (0 if machine.dry else LEAST_S)
        threads = max(1, (os.cpu_count() or 1) // jobs)
        kept = NO_TIME if short else train_run(machine, *job, machine.left_s, threads)
        with lock:
            if isinstance(kept, str):
                failures[name] = kept
            else:
                records[name] = kept
                print(f"    {name}: {scores(kept)}, {kept['provenance']['seconds']:.0f} s", flush=True)
            save()

    def save() -> dict[str, Any]:
        about = {"runs_at_a_time": jobs, "not_measured": dict(sorted(failures.items())), "records": dict(records)}
        bad = [name for name, why in failures.items() if why.startswith("failed")]
        return machine.write("runs", about | {"failure": f"failed: {', '.join(sorted(bad))}" if bad else None})

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(measure, wanted))
    return save()


def main() -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="what experiments/gpu.sh pack wrote")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, on generated data")
    parser.add_argument("--steps", default="train,fold,predict,retrieval,runs", help="of these; default all")
    parser.add_argument("--minutes", type=float, help="for all steps (default 7.5; a dry run 20, for slow machines)")
    parser.add_argument("--jobs", type=int, help="runs at a time in the last step (by the card's memory: 1 to 3)")
    parser.add_argument("--output", type=Path, help="folder of the JSONs; default $OUT, else experiments/results")
    args = parser.parse_args()
    if (args.folder is None) != args.dry:
        parser.error("give the folder that experiments/gpu.sh pack wrote, or --dry")
    output = args.output or Path(os.environ.get("OUT") or TOP / "experiments" / "results")
    if args.dry and args.output is None:
        output = Path(tempfile.mkdtemp(prefix="stexp-gpu-dry-"))
    output.mkdir(parents=True, exist_ok=True)
    minutes = args.minutes or (20 if args.dry else 7.5)
    with tempfile.TemporaryDirectory(prefix="stexp-gpu-") as scratch:
        pack = Path(scratch) / "pack" if args.dry else args.folder.resolve()
        machine = Machine(pack, output.resolve(), Path(scratch), start + 60 * minutes, args.dry)
        (machine.output / "gpu.log").write_text("")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, machine.end)
        if not args.dry:
            read_pack(pack)
        wheels = install(pack / "wheels", Path(scratch) / "site")
        if args.dry:  # Lightning imports wandb wherever it is installed
            leave_out(tuple(name for name in NOT_CALLED if name != "wandb"), Path(scratch) / "site")
        inspect_machine(machine)
        print(json.dumps(machine.facts | {"wheels": len(wheels)}, indent=1), flush=True)
        return measure(machine, args.steps.split(","), args.jobs or _jobs(machine))


def _jobs(machine: Machine) -> int:
    return 1 if machine.dry else max(1, min(3, int(machine.facts["gpu_memory_gb"] // 40)))


def measure(machine: Machine, chosen: list[str], jobs: int) -> int:
    """Every chosen step, in order; 0 where none failed."""
    records: dict[str, Any] = {}
    slides = f"--cache={machine.scratch / 'slides'}"
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "train": lambda: bench(machine, "train", "bench.py", ["--parts=a"], 150),
        "fold": lambda: first_fold(machine, records, 100),
        "predict-densenet121": lambda: bench(machine, "predict-densenet121", "bench_predict.py", [slides], 90),
        "predict-uni": lambda: bench(
            machine, "predict-uni", "bench_predict.py", [slides, "--encoder=uni", "--steps=12"], 90
        ),
        "retrieval": lambda: bench(machine, "retrieval", "bench.py", ["--parts=d"], 75),
        "runs": lambda: other_runs(machine, records, jobs),
    }
    unknown = set(chosen) - {step.split("-")[0] for step in steps} - set(steps)
    if unknown:
        sys.exit(f"--steps: no step {', '.join(sorted(unknown))}; choose of {', '.join(steps)}")
    measured = {}
    for step, run in steps.items():
        if (step not in chosen and step.split("-")[0] not in chosen) or (machine.dry and step == "predict-uni"):
            continue
        begun = time.monotonic()
        measured[step] = run()
        state = measured[step]["failure"] or "done"
        print(f"{step}: {state} after {time.monotonic() - begun:.0f} s, {machine.left_s:.0f} s left", flush=True)
        for what, value, aim, _ in lines_of(step, measured[step]) if step != "runs" else ():
            print(f"    {what}: {value} {aim}", flush=True)
    text = summary(measured)
    print(text)
    with (machine.output / "gpu.log").open("a") as log:
        log.write(text + "\n")
    failed = [step for step, facts in measured.items() if facts["failure"]]
    print(f"\nwrote {machine.output}" + (f"; NOT MEASURED: {', '.join(failed)}" if failed else ""), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
