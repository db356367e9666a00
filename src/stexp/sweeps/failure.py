"""Why a job failed: ``logs/failure.json``, which the job itself writes."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

from stexp.files import write_atomically

NAME = "failure.json"
LONGEST = 300


@dataclass(frozen=True)
class Failure:
    """End of a job that left no results.

    Parameters
    ----------
    kind
        Class of the error: ``InputError`` for what the user can mend.
    message
        One line.
    exit
        Status of the process.
    """

    kind: str
    message: str
    exit: int

    def __str__(self) -> str:
        return self.message if self.kind == "InputError" else f"{self.kind}: {self.message}"


def write_failure(logs: Path, error: BaseException, exit: int) -> None:
    """Record the error that ends a job."""
    message = " ".join(str(error).split())[:LONGEST]
    logs.mkdir(parents=True, exist_ok=True)
    failure = Failure(type(error).__name__, message, exit)
    write_atomically(logs / NAME, json.dumps(asdict(failure), indent=1))


def clear_failure(logs: Path) -> None:
    """Forget how an earlier attempt ended."""
    (logs / NAME).unlink(missing_ok=True)


def cause_of(logs: Path, status: int) -> str:
    """Why a job failed, in a line: what it recorded, else how its process ended."""
    path = logs / NAME
    if path.is_file():
        return str(Failure(**json.loads(path.read_text(encoding="utf-8"))))
    if status == 0:
        return "it ended well, without its results"
    if -status in signal.valid_signals():
        return f"its process was ended by {signal.Signals(-status).name}"
    return f"exit status {status}"
