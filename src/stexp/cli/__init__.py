"""Commands: each file reads its config and calls the layers below."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# torch, Lightning and timm make millions of objects that stay; with Python's own thresholds the collector goes over
# them again and again, for a quarter of a command's start
gc.set_threshold(50_000, 20, 50)


@contextmanager
def large_imports() -> Iterator[None]:
    """Import torch and what stands on it without looking for garbage among its objects, then or later."""
    at_start = "torch" not in sys.modules  # later there may be garbage among what would never be looked at again
    if at_start:
        gc.disable()
    try:
        yield
    finally:
        if at_start:
            gc.freeze()
            gc.enable()
