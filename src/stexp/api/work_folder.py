"""Folders that last as long as what was made in them is held."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path


class WorkFolder:
    """A folder for a run: a named one, which stays, or one that goes when nothing refers to this object any more.

    Parameters
    ----------
    path
        None: a new folder where the system keeps what is temporary.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        if path is not None:
            self.path = Path(path).expanduser()
            return
        self.path = Path(tempfile.mkdtemp(prefix="stexp-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
