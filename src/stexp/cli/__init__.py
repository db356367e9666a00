"""Commands: each file reads its config and calls the layers below."""

import atexit
import gc
import os
import sys

# torch, Lightning and timm make millions of objects that stay; with Python's own thresholds the collector goes over
# them again and again, for a quarter of a command's start
gc.set_threshold(50_000, 20, 50)


@atexit.register
def _leave_objects_to_the_system() -> None:
    """End without looking for cycles among these objects, for two seconds: the memory goes back as a whole.

    The first that is registered is called last, when all others have tidied up and streams are whole.
    """
    gc.freeze()
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # triton's bindings name every object that is left
