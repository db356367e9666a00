"""Jobs on Slurm, by submitit."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stexp.errors import InputError
from stexp.sweeps.jobs import Job
from stexp.sweeps.local import start_process
from stexp.sweeps.schedule import Slot, Start

if TYPE_CHECKING:
    import submitit


class Submitted:
    """A job that was submitted."""

    def __init__(self, submitted: submitit.Job[None]) -> None:
        self.submitted = submitted

    def poll(self) -> int | None:
        if not self.submitted.done():
            return None
        return 0 if self.submitted.exception() is None else 1

    def interrupt(self) -> None:
        self.submitted.cancel(check=False)

    def end(self, within_s: float) -> None:
        """Slurm ends it."""


def slurm_starter(launcher: Mapping[str, Any], environment: Mapping[str, str]) -> Start:
    """What submits a job with the resources of ``conf/hydra/launcher/slurm.yaml``."""
    try:
        import submitit  # optional
    except ImportError:
        raise InputError("hydra/launcher=slurm needs submitit: pip install 'stexp[slurm]'") from None
    parameters = {key: launcher[key] for key in ("gpus_per_node", "cpus_per_task", "mem_gb", "timeout_min")}
    parameters |= {f"slurm_{key}": launcher[key] for key in ("partition", "account") if launcher[key] is not None}
    if launcher["additional"]:
        parameters["slurm_additional_parameters"] = dict(launcher["additional"])

    def start(job: Job, slot: Slot) -> Submitted:
        executor = submitit.AutoExecutor(folder=job.logs / "submitit", cluster=launcher["cluster"])
        executor.update_parameters(name=f"stexp-{job.data}-{job.fold}", **parameters)
        return Submitted(executor.submit(run_process, job.arguments, job.typed, job.logs, environment))

    return start


def run_process(arguments: Sequence[str], typed: str, logs: Path, environment: Mapping[str, str]) -> None:
    """Run a job to its end, on the node that Slurm chose."""
    process = start_process(arguments, typed, logs, environment)
    if status := process.wait():
        raise subprocess.CalledProcessError(status, list(arguments))
