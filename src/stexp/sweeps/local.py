"""Jobs as processes of this machine, one a GPU."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stexp.errors import InputError
from stexp.files import naming
from stexp.sweeps.failure import clear_failure
from stexp.sweeps.jobs import Job
from stexp.sweeps.schedule import Slot


class Local:
    """A job that runs on this machine; it ends with this process, whatever ends it."""

    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        self.process = start_process(job.arguments, job.typed, job.logs, environment)

    def poll(self) -> int | None:
        return self.process.poll()

    def interrupt(self) -> None:
        interrupt(self.process)

    def end(self, within_s: float) -> None:
        end(self.process, within_s)


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """Ask a job to end."""
    if os.name == "posix":
        process.send_signal(signal.SIGINT)
    else:
        assert process.stdin is not None
        process.stdin.close()


def end(process: subprocess.Popen[bytes], within_s: float) -> None:
    """Return once a job has ended, by force after so many seconds."""
    try:
        process.wait(within_s)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()


def start_process(
    arguments: Sequence[str], typed: str, logs: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a job, what it prints appended to ``job.log``.

    Its standard input is a pipe that closes when this process ends; with ``STEXP_PARENT``, the id of this process,
    it is how ``stexp.cli.job`` sees that.
    """
    logs.mkdir(parents=True, exist_ok=True)
    clear_failure(logs)
    path = logs / "job.log"
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(f"$ {typed}\n")
        file.flush()
        return subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, "STEXP_PARENT": str(os.getpid())},
            start_new_session=True,  # Ctrl-C is for the sweep, which ends its jobs
        )


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` or nvidia-smi names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",") if name.strip()]
        return names[: names.index("-1")] if "-1" in names else names
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line.split(":")[0].split()[1] for line in listed.splitlines() if line.startswith("GPU ")]


def gpu_slots(visible: Sequence[str], requested: Sequence[Any] | None, jobs_per_gpu: int) -> list[Slot]:
    """A slot for every job that may run at once: one on the CPU where no GPU is there and none is asked for.

    Raises
    ------
    InputError
        A GPU that is not there, or a number of jobs that is none.
    """
    if not (isinstance(jobs_per_gpu, int) and jobs_per_gpu >= 1):
        raise InputError(f"hydra.launcher.jobs_per_gpu={jobs_per_gpu}: a whole number of at least 1 would fit")
    chosen = list(visible) if requested is None else list(dict.fromkeys(map(str, requested)))
    absent = [gpu for gpu in chosen if gpu not in visible]
    if absent or (requested is not None and not chosen):
        wrong, there = ", ".join(absent) or "none", ", ".join(visible) or "none"
        raise InputError(f"hydra.launcher.gpus: {wrong} asked for, and there are {there}")
    # a GPU's second job comes after every GPU's first
    names = [gpu for _ in range(jobs_per_gpu) for gpu in chosen]
    return [Slot(f"on GPU {gpu}", {"CUDA_VISIBLE_DEVICES": gpu}) for gpu in names] or [Slot()]
