"""Jobs on what Ray runs on: a machine, a cluster, a cloud."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stexp.errors import InputError
from stexp.sweeps.jobs import Job
from stexp.sweeps.local import start_process
from stexp.sweeps.schedule import Slot, Start

if TYPE_CHECKING:
    import ray


class Task:
    """A job that Ray has."""

    def __init__(self, reference: ray.ObjectRef) -> None:
        self.reference = reference

    def poll(self) -> int | None:
        import ray

        ready, _ = ray.wait([self.reference], timeout=0)
        if not ready:
            return None
        try:
            return ray.get(self.reference)
        except ray.exceptions.RayError:  # its worker was killed, or it was cancelled
            return 1

    def interrupt(self) -> None:
        import ray

        ray.cancel(self.reference)

    def end(self, within_s: float) -> None:
        import ray

        if not ray.wait([self.reference], timeout=within_s)[0]:
            ray.cancel(self.reference, force=True)


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
        ray.init(address, log_to_driver=False, configure_logging=False, ignore_reinit_error=True, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"hydra.launcher.address={address}: {str(error).splitlines()[0]}") from error
    resources = _resources(launcher, ray.cluster_resources(), is_here=address is None)
    run_there = ray.remote(**resources, max_retries=0)(run_process)
    own = {key: value for key, value in os.environ.items() if key.startswith("STEXP_")} | dict(environment)

    def start(job: Job, slot: Slot) -> Task:
        return Task(run_there.remote(job.arguments, job.typed, job.logs, own, Path.cwd()))

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
        return process.wait()
    except KeyboardInterrupt:  # cancelled
        assert process.stdin is not None
        process.stdin.close()  # by which the job ends itself
        process.wait()
        raise
