"""Jobs on what Ray runs on: a machine, a cluster, a cloud."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stexp.errors import InputError
from stexp.sweeps.failure import write_failure
from stexp.sweeps.jobs import Job
from stexp.sweeps.local import end, interrupt, start_process
from stexp.sweeps.schedule import INTERVAL_S, PATIENCE_S, Slot, Start

if TYPE_CHECKING:
    import ray


class Task:
    """A job that Ray has."""

    def __init__(self, reference: ray.ObjectRef, logs: Path) -> None:
        self.reference, self.logs = reference, logs

    def poll(self) -> int | None:
        import ray

        ready, _ = ray.wait([self.reference], timeout=0)
        if not ready:
            return None
        try:
            return ray.get(self.reference)
        except ray.exceptions.RayTaskError as error:  # where it was put, it could not be started
            write_failure(self.logs, error.cause, 1)
        except ray.exceptions.RayError as error:  # its worker was killed, its machine is lost, or it was cancelled
            write_failure(self.logs, error, 1)
        return 1

    def interrupt(self) -> None:
        import ray

        ray.cancel(self.reference)

    def end(self, within_s: float) -> None:
        import ray

        if not ray.wait([self.reference], timeout=within_s)[0]:
            ray.cancel(self.reference, force=True)
            ray.wait([self.reference], timeout=PATIENCE_S)


def ray_starter(launcher: Mapping[str, Any], environment: Mapping[str, str]) -> Start:
    """What gives a job to Ray with the resources of ``conf/hydra/launcher/ray.yaml``.

    Raises
    ------
    InputError
        No Ray, no cluster at its address, or a share of GPUs or CPUs that this machine has not.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    try:
        import ray  # optional
    except ImportError:
        raise InputError("hydra/launcher=ray needs Ray: pip install 'stexp[ray]'") from None
    address = launcher["address"] or os.environ.get("RAY_ADDRESS")
    options = {} if address else {"include_dashboard": False}
    try:
        ray.init(address or "local", log_to_driver=False, configure_logging=False, ignore_reinit_error=True, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"hydra.launcher.address={address}: {str(error).splitlines()[0]}") from error
    resources = _resources(launcher, ray.cluster_resources(), is_here=address is None)
    run_there = ray.remote(**resources, max_retries=0)(run_process)
    own = {key: value for key, value in os.environ.items() if key.startswith("STEXP_")} | dict(environment)

    def start(job: Job, slot: Slot) -> Task:
        reference = run_there.remote(job.arguments, job.typed, job.logs, own, Path.cwd())
        return Task(reference, job.logs)

    return start


def _resources(launcher: Mapping[str, Any], there: Mapping[str, float], is_here: bool) -> dict[str, float]:
    """CPUs and GPUs of a job. A cluster may grow: what it lacks now is waited for."""
    asked = {"num_cpus": launcher["num_cpus"], "num_gpus": launcher["num_gpus"]}
    if asked["num_gpus"] is None:
        asked["num_gpus"] = 1 if there.get("GPU") else 0
    for key, kind in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
        value = asked[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise InputError(f"hydra.launcher.{key}={value}: a number of at least 0 would fit")
        if is_here and value > there.get(kind, 0):
            raise InputError(f"hydra.launcher.{key}={value}: Ray sees {there.get(kind, 0):g} {kind}s on this machine")
    return asked


def run_process(arguments: Sequence[str], typed: str, logs: Path, environment: Mapping[str, str], folder: Path) -> int:
    """Run a job to its end where Ray put it, in the folder that the sweep was started in; returns its exit status."""
    os.chdir(folder)
    process = start_process(arguments, typed, logs, environment)
    try:
        while (status := process.poll()) is None:
            time.sleep(INTERVAL_S)  # Ray's interrupt does not end a wait
        return status
    except KeyboardInterrupt:  # cancelled
        interrupt(process)
        end(process, PATIENCE_S)
        raise
