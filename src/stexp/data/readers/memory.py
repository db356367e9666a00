"""Whether what a file announces fits into memory, asked before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stexp.data.slides.pixels import free_memory as free_on_machine
from stexp.errors import InputError

CGROUP = Path("/sys/fs/cgroup")
"""Where containers on Linux find the bound and use of their memory."""
UNKNOWN = 8 << 30
"""What is taken to be free where the system does not say, in bytes."""


def free_memory() -> int:
    """Bytes that may still be allocated: what the machine has, within the bound of the container."""
    free = free_on_machine()
    free = UNKNOWN if free is None else free
    try:
        bound, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or "max"
        return free
    return max(0, min(free, bound - used))


def check_fits(n_bytes: int, subject: str) -> None:
    """Raise InputError unless `n_bytes` are free; `subject` names what needs them."""
    free = free_memory()
    if n_bytes > free:
        raise InputError(
            f"{subject} needs about {n_bytes / 1e9:.1f} GB of memory, {max(free, 0) / 1e9:.1f} GB are free; is the "
            f"file damaged, or made for a larger machine?"
        )


@contextmanager
def one_line_without_memory(subject: str) -> Iterator[None]:
    """Turn a MemoryError into one line that names `subject`."""
    try:
        yield
    except MemoryError:
        raise InputError(
            f"{subject} does not fit into memory, of which {free_memory() / 1e9:.1f} GB are free"
        ) from None
