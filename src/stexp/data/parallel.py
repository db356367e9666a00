"""Work on every section of a data set on all cores, and work beside other work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from threading import Thread
from typing import Generic, TypeVar

from stexp import hardware
from stexp.data.progress import track

Item = TypeVar("Item")
Made = TypeVar("Made")


def on_all_cores(
    items: Iterable[Item], total: int, what: str, make: Callable[[Item], Made], at_most: int | None = None
) -> list[Made]:
    """What is made of each item, in order: as many at once as there are cores; the first error of the order is raised.

    Parameters
    ----------
    total
        Number of items.
    what
        Is done, for the progress.
    at_most
        Made at once, of what takes much memory; None: as many as there are cores.
    """
    n = min(hardware.usable_cores(), max(1, total))
    with ThreadPoolExecutor(n if at_most is None else min(n, at_most)) as pool:
        # threads do not inherit context variables, such as where lines about tables are counted
        waiting = [pool.submit(copy_context().run, make, item) for item in items]
        try:
            return [each.result() for each in track(waiting, total, what)]
        finally:
            pool.shutdown(cancel_futures=True)


class Background(Generic[Made]):
    """Work in a thread of its own, which begins at once; an interrupted command does not wait for its end.

    Parameters
    ----------
    work
        Calculates in libraries that let other threads go on, such as NumPy; else it only takes turns with them. Not in
        torch, which a process cannot leave while another thread is in it.
    """

    def __init__(self, work: Callable[[], Made]) -> None:
        self._made: Future[Made] = Future()
        Thread(target=copy_context().run, args=(self._run, work), daemon=True).start()

    def _run(self, work: Callable[[], Made]) -> None:
        try:
            self._made.set_result(work())
        except BaseException as error:  # whoever asks for the result meets it
            self._made.set_exception(error)

    def result(self) -> Made:
        """What the work made, once it is done; its error is raised."""
        return self._made.result()
