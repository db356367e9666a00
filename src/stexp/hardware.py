"""What this machine does faster: precision, memory format, allocator."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys

from stexp.errors import InputError

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


def accelerator_of(name: str) -> str:
    """``"cuda"`` or ``"cpu"`` for a trainer's ``accelerator``; ``auto`` takes a GPU where there is one."""
    import torch

    if name not in ("auto", "cpu", "gpu", "cuda"):
        raise InputError(f"trainer.accelerator={name}: choose auto, cpu or gpu")
    if name in ("gpu", "cuda") and not torch.cuda.is_available():
        raise InputError(f"trainer.accelerator={name}: torch sees no GPU here; take cpu or auto")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def choose_precision(precision: str, device: str) -> str:
    """Lightning's precision for ``"auto"``: bf16 where the hardware multiplies it, else float32."""
    import torch

    if precision != "auto":
        return precision
    if device == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if cpu_has_bf16() else "32-true"


def cpu_has_bf16() -> bool:
    """Whether the CPU has bf16 matrix instructions (AVX512-BF16 or AMX)."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line.split() for line in file if line.startswith("flags")), [])
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def describe() -> dict:
    """Hardware and versions, for the provenance of a result."""
    import torch

    facts = {"machine": platform.platform(), "cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0))}
    if torch.cuda.is_available():
        facts["gpu"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


def peak_memory() -> dict[str, float]:
    """Peak resident memory of this process and peak memory allocated on its GPU, in GB."""
    import torch

    peak = {"peak_memory_gb": round(_peak_resident_bytes() / 1e9, 3)}
    if torch.cuda.is_available():
        peak["peak_gpu_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return peak


def _peak_resident_bytes() -> int:
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        # on Linux this one starts from the size of the process that launched us
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"
