"""Why a job failed: ``logs/failure.json``, which the job itself writes."""

from __future__ import annotations

import json
import signal
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from typing_extensions import TypedDict  # that of typing carries no annotations before Python 3.12

from stexp.errors import InputError, in_one_line
from stexp.evaluation.records import read_json
from stexp.files import write_atomically

NAME = "failure.json"
LONGEST = 300
MENDABLE = 2
"""Exit status of a command that has said in one line what the user can mend."""


class Record(TypedDict):
    kind: str
    message: str
    exit: int


@dataclass(frozen=True)
class Failure:
    """End of a job that left no results.

    Parameters
    ----------
    kind
        Class of the error.
    message
        One line.
    exit
        Status of the process.
    """

    kind: str
    message: str
    exit: int

    def __str__(self) -> str:
        return self.message if self.is_mendable or not self.kind else f"{self.kind}: {self.message}"

    @property
    def is_mendable(self) -> bool:
        """Whether the user can mend it: what was given does not fit, a disk is full or may not be written."""
        return self.exit == MENDABLE


def write_failure(logs: Path, error: BaseException, exit: int) -> None:
    """Record the error that ends a job, where the disk still takes the record."""
    message = in_one_line(error) if isinstance(error, Exception) else " ".join(str(error).split())
    failure = Failure(type(error).__name__, message[:LONGEST], exit)
    with suppress(OSError):  # the exit status says what kind of end it was
        logs.mkdir(parents=True, exist_ok=True)
        write_atomically(logs / NAME, json.dumps(asdict(failure), indent=1))


def clear_failure(logs: Path) -> None:
    """Forget how an earlier attempt ended."""
    (logs / NAME).unlink(missing_ok=True)


def cause_of(logs: Path, status: int) -> Failure:
    """Why a job failed: what it recorded, else how its process ended."""
    path = logs / NAME
    if path.is_file():
        try:
            return Failure(**read_json(path, Record))
        except InputError:
            pass  # cut, or of another version
    message = f"exit status {status}; is the disk of {logs} full?" if status == MENDABLE else f"exit status {status}"
    if status == 0:
        message = "it ended well, without its results"
    elif -status in signal.valid_signals():
        message = f"its process was ended by {signal.Signals(-status).name}"
    return Failure("", message, status)
