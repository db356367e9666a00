"""How a command ends."""

from __future__ import annotations

import atexit
import functools
import gc
import logging
import os
import sys


@functools.cache
def end_quickly() -> None:
    """Let the process end, once all is said, without looking for cycles among its objects, which takes two seconds."""
    atexit.register(_leave_objects_to_the_system)


def _leave_objects_to_the_system() -> None:
    gc.freeze()
    logging.shutdown()
    for stream in (sys.stderr, sys.stdout):
        if stream is not None and not stream.closed:
            stream.flush()  # what cannot be written is said while there is a stderr
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # triton's bindings name every object that is left
