"""What this machine does faster: accelerator, precision, memory format, allocator.

Everything here works on Linux, macOS and Windows; a figure that a system does not give is left out.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from threadpoolctl import threadpool_limits

from stexp.errors import InputError

log = logging.getLogger(__name__)

T = TypeVar("T")

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Let glibc keep what was freed, so that large CPU batches do not fault their pages in again.

    Returns whether it was done: only with glibc on Linux, and not where ``STEXP_MALLOC=0`` is set.
    The process holds its peak memory from then on.
    """
    if os.environ.get("STEXP_MALLOC") == "0" or sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(
        libc.mallopt(ctypes.c_int(option), ctypes.c_int(value))
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 256 << 20))
    )


def accelerator_of(name: str, key: str = "trainer.accelerator") -> str:
    """``"cuda"``, ``"mps"`` (Apple's GPU) or ``"cpu"`` for a name of `ACCELERATORS`.

    ``auto`` takes CUDA where there is one, else the CPU; ``gpu`` whichever GPU torch sees.

    Parameters
    ----------
    key
        The config key that `name` was given for, for messages.

    Raises
    ------
    InputError
        Another name, or a GPU that torch does not see.
    """
    import torch

    if name not in ACCELERATORS:
        raise InputError(f"{key}={name}: choose {', '.join(ACCELERATORS)}")
    # what mps computes differs from the CPU in the last digits: it is asked for by name
    sees = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    order = {"auto": ("cuda", "cpu"), "gpu": ("cuda", "mps")}.get(name, (name,))
    kind = next((kind for kind in order if sees[kind]), None)
    if kind is None:
        what = "GPU of Apple" if name == "mps" else "GPU"
        raise InputError(f"{key}={name}: torch sees no {what} here; take cpu or auto")
    return kind


@dataclass(frozen=True)
class Moment:
    """Clocks of the machine and of this process, at one time.

    Attributes
    ----------
    wall, own
        Seconds by the clock, and those that this process computed, all threads together.
    ticks
        See :func:`core_ticks`.
    process
        Its number; a forked one has clocks of its own.
    """

    wall: float
    own: float
    ticks: tuple[int, int] | None
    process: int

    @classmethod
    def now(cls) -> Moment:
        """The clocks as they stand."""
        return cls(time.perf_counter(), time.process_time(), core_ticks(), os.getpid())

    def own_cores(self) -> float:
        """How many cores this process took since."""
        return (time.process_time() - self.own) / max(time.perf_counter() - self.wall, 1e-9)


def watch_cores() -> None:
    """Begin to look how busy the cores are, so that `busy_cores` need not sleep for it: as commands do first."""
    global _watched_since
    _watched_since = Moment.now()


_watched_since: Moment | None = None


def busy_cores(seconds: float = 0.2) -> float:
    """How many cores of this machine others keep busy; 0 where the system does not say.

    Measured since :func:`watch_cores`, where that is `seconds` ago and no more than half a minute, else for `seconds`,
    in which this process sleeps. The load average is a mean over a minute, and would count what this command did
    before; it is taken where the system does not say more, without this process.
    """
    since = _watched_since
    if since is None or since.process != os.getpid() or not seconds <= time.perf_counter() - since.wall <= 30:
        since = Moment.now()
        if since.ticks is not None:
            time.sleep(seconds)
    free = free_cores(since.ticks)
    if free is not None:
        return max(0.0, (os.cpu_count() or 1) - free - since.own_cores())
    try:
        return max(0.0, os.getloadavg()[0] - 1)
    except (OSError, AttributeError):  # the latter: Windows
        return 0.0


def set_threads(n: int) -> None:
    """Let torch, and the linear algebra of NumPy and SciPy, take `n` CPU threads each.

    The latter wait for each other without pause: on a core that others need, they take ten times as long.
    """
    import torch

    torch.set_num_threads(n)
    threadpool_limits(n)


def free_cores(before: tuple[int, int] | None) -> float | None:
    """How many cores of this machine were idle since :func:`core_ticks` were `before`; None where nobody says."""
    now = core_ticks()
    if before is None or now is None:
        return None
    idle, total = now[0] - before[0], now[1] - before[1]
    return (os.cpu_count() or 1) * (idle / total if total else 1.0)


def core_ticks() -> tuple[int, int] | None:
    """Ticks of all cores since the start of the machine: idle, and all; None on other systems than Linux."""
    try:
        with open("/proc/stat") as file:
            name, *ticks = file.readline().split()[:9]  # user nice system idle iowait irq softirq steal
        numbers = [int(each) for each in ticks]
    except (OSError, ValueError):
        return None
    return None if name != "cpu" or len(numbers) < 5 else (numbers[3] + numbers[4], sum(numbers))


def choose_precision(precision: str, device: str) -> str:
    """Lightning's precision for ``"auto"``: bf16 where the hardware multiplies it, else float32."""
    import torch

    if precision != "auto":
        return precision
    if device == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if device == "cpu" and cpu_has_bf16() else "32-true"


def cpu_has_bf16() -> bool:
    """Whether the CPU has bf16 matrix instructions (AVX512-BF16 or AMX), as Linux says."""
    flags = _cpu_info("flags").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def usable_cores() -> int:
    """CPUs that this process may run on, where the system says so, else those of the machine."""
    affinity = getattr(os, "sched_getaffinity", None)  # of Linux alone
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def describe() -> dict:
    """Hardware, for the provenance of a result; what is to be had."""
    facts = {
        "machine": _figure(platform.platform),
        "cpu": _figure(_cpu_name),
        "cores": _figure(usable_cores),
        "gpu": _figure(_gpu_names),
    }
    return {key: value for key, value in facts.items() if value is not None}


def peak_memory() -> dict[str, float]:
    """Peak resident memory of this process and peak memory allocated on its GPU, in GB; those that are to be had."""
    peak = {"peak_memory_gb": _figure(_peak_resident_bytes), "peak_gpu_memory_gb": _figure(_peak_gpu_bytes)}
    return {key: round(value / 1e9, 3) for key, value in peak.items() if value is not None}


def _figure(read: Callable[[], T]) -> T | None:
    """A figure for the record, None where it is not to be had: no such figure is worth the work that it describes."""
    try:
        return read()
    except Exception as error:  # of whatever system, driver or version this is
        log.debug("%s: %r", read, error)
        return None


def _gpu_names() -> list[str] | None:
    import torch

    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ["Apple (mps)"] if torch.backends.mps.is_available() else None


def _peak_gpu_bytes() -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def _peak_resident_bytes() -> int | None:
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        import resource  # Windows has none
    except ImportError:
        return None
    # of macOS in bytes, elsewhere in kB; on Linux it starts from the size of the process that launched us
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _cpu_name() -> str:
    return _cpu_info("model name") or platform.processor() or "unknown"


def _cpu_info(key: str) -> str:
    """What ``/proc/cpuinfo`` says of the first CPU; nothing on other systems than Linux."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith(key)), "")
    except (OSError, IndexError):
        return ""
