"""Files that are whole or not there, tables that a spreadsheet opens safely, folders with one writer at a time."""

from __future__ import annotations

import errno
import gzip
import io
import logging
import os
import platform
import re
import secrets
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

from filelock import FileLock, Timeout

from stexp.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

_PACKAGED = Path(__file__).parent / "conf"
CONF = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "conf"
"""The configs: inside an installed package, or at the top of a checkout."""

_FORMULA = re.compile(r"'*\s*[=+\-@]")
"""How text begins that a spreadsheet computes, or that :func:`defuse` made of such text."""

_PROCESS = f"{zlib.crc32(platform.node().encode()):08x}-{{}}-"
"""How the name of a part says which process of which machine writes it."""
_LEFT = re.compile(re.escape(_PROCESS).replace(r"\{\}", "([0-9]+)") + r"[0-9a-f]{6}\.part.*")

Cell = TypeVar("Cell")


@contextmanager
def replacing(path: Path, suffix: str = ".part") -> Iterator[Path]:
    """A name beside `path` to write to; it takes the place of `path` when the block ends well, else it is removed.

    What a process that was killed left of the same file is removed, too.

    Parameters
    ----------
    suffix
        End of the name, for writers that look at it. No other process writes to the same name.
    """
    part = path.with_name(f".{path.name}.{_PROCESS.format(os.getpid())}{secrets.token_hex(3)}{suffix}")
    try:
        with naming(path, part):
            _clean(path)
            yield part
            os.replace(part, path)
    finally:
        with suppress(OSError):  # a read-only disk refuses this even where nothing is to delete
            part.unlink()


@contextmanager
def naming(path: Path, part: Path | None = None) -> Iterator[None]:
    """Let an OSError that has no file name, or that of `part` or of a file in it, name `path` instead."""
    try:
        yield
    except OSError as error:
        if error.errno is None and type(error) is not OSError:  # an image or a server, say
            raise
        name = "" if error.filename is None else str(error.filename)
        if name and (part is None or not name.startswith(str(part))):
            raise
        where = f"{path}{name.removeprefix(str(part))}"
        if error.errno is None:  # numpy's, of a disk that took less than was written
            raise OSError(errno.EIO, f"cannot be written whole ({error}); is the disk full?", where) from error
        raise OSError(error.errno, error.strerror, where) from error


def _clean(path: Path) -> None:
    """Delete what processes of this machine that were killed while they wrote `path` left beside it."""
    if sys.platform == "win32":  # where asking for a process would end it
        return
    start = f".{path.name}."
    for name in os.listdir(path.parent):
        left = _LEFT.fullmatch(name.removeprefix(start)) if name.startswith(start) else None
        if left and not _is_alive(int(left[1])):
            path.with_name(name).unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the whole new one."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def defuse(value: Cell) -> Cell | str:
    """A cell of a table that no spreadsheet takes for a formula: such text gets an apostrophe in front.

    What is not text, and text that is a number, stays as it is. :func:`restore` takes the apostrophe away again.
    """
    if isinstance(value, str) and _FORMULA.match(value) and not is_number(value):
        return f"'{value}"
    return value


def restore(value: str) -> str:
    """The text that :func:`defuse` got."""
    return value[1:] if value.startswith("'") and _FORMULA.match(value[1:]) else value


def is_number(text: str) -> bool:
    """Whether a text is a number as Python reads it."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def write_csv(table: pd.DataFrame, path: Path, index: str | None = None) -> None:
    """Write a table for people and their spreadsheets: six digits, text defused, whole or not at all.

    Parameters
    ----------
    path
        With ``.gz`` it is compressed.
    index
        Heading of the index; None leaves the index out.
    """
    with table_file(path) as file:
        append_csv(table, file, index)


@contextmanager
def table_file(path: Path) -> Iterator[TextIO]:
    """A text file for a table in parts, gzip where the name says so; whole or not at all."""
    with replacing(path) as part, part.open("wb") as raw:
        # without a time the same table is the same bytes
        binary = gzip.GzipFile("", "wb", 6, raw, mtime=0) if path.suffix == ".gz" else raw
        with binary, io.TextIOWrapper(binary, encoding="utf-8", newline="") as text:
            yield text


def append_csv(table: pd.DataFrame, file: TextIO, index: str | None = None, header: bool = True) -> None:
    """Rows of a table, as :func:`write_csv` writes them."""
    import pandas as pd  # takes half a second to import, and every command imports this module

    def defused(values: Iterable) -> list:
        return [defuse(value) for value in values]

    columns = {
        i: pd.Series(defused(column), column.index, dtype=object)
        for i, (_, column) in enumerate(table.items())
        if not pd.api.types.is_numeric_dtype(column)
    }
    safe = pd.DataFrame({i: columns.get(i, table.iloc[:, i]) for i in range(table.shape[1])}, table.index)
    safe.columns = defused(table.columns)
    if index is not None:
        safe.index = pd.Index(defused(table.index), dtype=object if len(table) else None)
    safe.to_csv(
        file,
        header=header,
        index=index is not None,
        index_label=index,
        float_format="%.6g",
        lineterminator="\n",
    )


@contextmanager
def alone_in(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder that is written, made where it is not there; InputError where another process holds it.

    Parameters
    ----------
    wait
        For the other process to end, in place of an error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise InputError(
                f"another process is at work in {folder}; wait for it, or choose another output_dir"
            ) from None
        log.info("another process is at work in %s; waiting for it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
