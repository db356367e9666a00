"""How far long work is: a bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, TaskID

log = logging.getLogger(__name__)

Item = TypeVar("Item")

_bars: list[Progress] = []
"""The one display of bars that a terminal has, once for every piece of work in it; work may lie within work."""
_lock = Lock()

PATIENCE_S, LINE_EVERY_S = 2.0, 15.0  # before a bar appears; between lines of the log


@contextmanager
def progress(total: int, what: str, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Show how far work is while the context lasts; work of seconds shows nothing.

    Parameters
    ----------
    total
        Of whatever is counted.
    what
        In front of the bar or of the numbers.
    unit
        Behind the numbers: ``"MB"``.

    Yields
    ------
    callable
        Takes by how much the work is further. Call it from one thread.
    """
    console = Console(stderr=True)
    bar: Progress | None = None
    task = TaskID(0)
    done, begun = 0, time.monotonic()
    last_line = begun

    def advance(n: int) -> None:
        nonlocal bar, task, done, last_line
        done, now = done + n, time.monotonic()
        if not console.is_terminal:
            if now - last_line >= LINE_EVERY_S:
                log.info("%s: %d of %d%s", what, done, total, unit and f" {unit}")
                last_line = now
            return
        if bar is None and now - begun >= PATIENCE_S:
            bar = _join_bars(console)
            task = bar.add_task(what, total=total)
        if bar is not None:
            bar.update(task, completed=done, description=f"{what}: {done} of {total}{unit and f' {unit}'}")

    try:
        yield advance
    finally:
        if bar is not None:
            _leave_bars(bar, task)


def _join_bars(console: Console) -> Progress:
    with _lock:
        if not _bars:
            bar = Progress(*Progress.get_default_columns(), console=console, transient=True)
            bar.start()
        else:
            bar = _bars[0]
        _bars.append(bar)
        return bar


def _leave_bars(bar: Progress, task: TaskID) -> None:
    with _lock:
        _bars.remove(bar)
        if _bars:
            bar.remove_task(task)
        else:
            bar.stop()


def track(items: Iterable[Item], total: int, what: str, size: Callable[[Item], int] = lambda item: 1) -> Iterator[Item]:
    """Go through `items`, showing how far it is; see `progress`.

    Parameters
    ----------
    total
        Sum of the sizes of all items.
    size
        What an item counts for once it is done with; by default one.
    """
    with progress(total, what) as advance:
        for item in items:
            yield item
            advance(size(item))
