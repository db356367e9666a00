"""Tables as people's programs write them: packing, encoding, line ends, separator and decimal sign."""

from __future__ import annotations

import codecs
import csv
import io
import logging
import re
import zlib
from pathlib import Path

import pandas as pd

from stexp.data.readers.memory import check_fits, free_memory, one_line_without_memory
from stexp.data.readers.numbers import decimal_points
from stexp.errors import InputError

log = logging.getLogger(__name__)

SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
"""What a file of this ending is separated by, unless its first lines say otherwise; each also as ``.gz``."""
CANDIDATES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars", " ": "blanks"}
HEAD = 20  # lines that decide about the separator
CHUNK = 1 << 22  # bytes unpacked at a time
TEXT_TIMES = 3
"""Memory that a text takes while it is decoded, in units of its own size."""

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte-order marks and the encodings they stand for; the longer of two that begin alike comes first."""

EMPTY_LINES = re.compile(rb"\A(?:[ \t,;|]*\n)+")
"""Above the header; spreadsheets fill them with separators."""


def ending_of(path: Path) -> str:
    """The ending that says what a file holds, in small letters: that before ``.gz``, with it."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:]) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def separator_of_ending(path: Path, subject: str, also: tuple[str, ...] = ()) -> str:
    """Separator that the ending of a table promises; InputError for an ending of something else."""
    ending = ending_of(path)
    plain = ending.removesuffix(".gz")
    if plain not in SEPARATORS:
        fitting = [".csv", ".tsv", ".csv.gz", ".tsv.gz", *also]
        raise InputError(f"{subject} {path} ends in {ending or 'nothing'}; {', '.join(fitting)} would fit")
    return SEPARATORS[plain]


def read_text(path: Path, subject: str) -> bytes:
    """Content of a text file, plain or gzip, as UTF-8 with ``\\n`` line ends and without a byte-order mark.

    Raises
    ------
    InputError
        Damaged, larger than memory allows, or no text; `subject` names the file in the message.
    """
    with one_line_without_memory(f"{subject} {path}"):
        content = _unpacked(path, subject)
        return _with_newlines(_as_utf8(content, path, subject))


def _unpacked(path: Path, subject: str) -> bytes:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(2) != b"\x1f\x8b":
                check_fits(TEXT_TIMES * size, f"{subject} {path}")
                file.seek(0)
                return file.read()
            file.seek(0)
            return _gunzip(file, path, subject)
    except (OSError, zlib.error) as error:
        raise InputError(f"{subject} {path} cannot be read ({error}); fetch the file again") from None


def _gunzip(file: io.BufferedReader, path: Path, subject: str) -> bytes:
    """All members of a gzip file; refused as soon as they are larger than memory allows."""
    most = free_memory() // TEXT_TIMES
    parts, length, unpacker, packed = [], 0, zlib.decompressobj(31), file.read(CHUNK)
    while True:
        part = unpacker.decompress(packed, CHUNK)
        parts.append(part)
        length += len(part)
        if length > most:
            raise InputError(
                f"{subject} {path} unpacks to more than {most / 1e9:.1f} GB, which is what the free memory allows; is "
                f"it damaged?"
            )
        if unpacker.eof:
            packed = unpacker.unused_data or file.read(CHUNK)
            if not packed.rstrip(b"\0"):  # padding after the last member
                return b"".join(parts)
            unpacker = zlib.decompressobj(31)
            continue
        packed = unpacker.unconsumed_tail or file.read(CHUNK)
        if not packed:
            raise InputError(f"{subject} {path} cannot be read (it ends too early); fetch the file again")


def _as_utf8(content: bytes, path: Path, subject: str) -> bytes:
    mark, encoding = next(
        ((mark, encoding) for mark, encoding in MARKS if content.startswith(mark)), (b"", _encoding_by_zeros(content))
    )
    content = content[len(mark) :]
    if encoding == "utf-8" and content.isascii():
        return content
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        western = None if mark or b"\0" in content else _decoded(content, "cp1252")
        if western is None:
            raise InputError(f"{subject} {path} are not text; a table, plain or gzip, would fit") from None
        text = western
        strange = next(line for line in text.splitlines() if not line.isascii())
        log.warning(
            "%s %s is not UTF-8; read as Windows-1252 (Latin-1), where a line holds %r", subject, path, strange[:60]
        )
    if encoding != "utf-8":
        log.info("%s %s is %s", subject, path, encoding.upper())
    return text.encode("utf-8")


def _decoded(content: bytes, encoding: str) -> str | None:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        return None


def _encoding_by_zeros(content: bytes) -> str:
    """UTF-16 without a mark shows by zeros in every other byte."""
    head = content[:1000]
    even, odd = head[::2].count(0), head[1::2].count(0)
    if len(content) % 2 == 0 and len(head) >= 4:
        if odd > 0.6 * len(head) / 2 and even == 0:
            return "utf-16-le"
        if even > 0.6 * len(head) / 2 and odd == 0:
            return "utf-16-be"
    return "utf-8"


def _with_newlines(content: bytes) -> bytes:
    """Line ends of Windows and of old Macs, and mixtures of them, become ``\\n``."""
    if b"\r" in content:
        for end in (b"\r\r\n", b"\r\n", b"\r"):
            content = content.replace(end, b"\n")
    return content


def find_separator(content: bytes, path: Path, subject: str, expected: str) -> tuple[bytes, str]:
    """A table without Excel's line ``sep=;``, and the separator of its cells.

    Parameters
    ----------
    content
        UTF-8, as `read_text` gives it.
    expected
        Separator that the ending of the file promises; it wins wherever it splits the first lines evenly.

    Returns
    -------
    bytes, str
        A separator that differs from the promise is logged; it is the promised one where none fits better.
    """
    separator = expected
    announced = re.match(rb'"?sep=(.)"?\r?\n', content)
    if announced:
        separator, content = announced[1].decode(), content[announced.end() :]
    else:
        separator = _separator(_head(content), expected)
    if separator != expected:
        log.warning(
            "%s %s is separated by %s, not by %s as its ending says; read so",
            subject,
            path,
            CANDIDATES.get(separator, repr(separator)),
            CANDIDATES[expected],
        )
    return content, separator


def _separator(lines: list[str], expected: str) -> str:
    """The promised separator, unless another one fits the first lines better.

    Another one does that splits all lines evenly, where the promised one leaves the header whole, or where it splits
    them into no fewer cells: ``a;1,5;2,5`` has three cells in either case.
    """
    if not lines:
        return expected
    others = [candidate for candidate in CANDIDATES if candidate not in (" ", expected)]
    widths = {candidate: _width(lines, candidate) for candidate in others}
    best = max(widths, key=widths.__getitem__)
    if widths[best] and (not _width(lines[:1], expected) or _is_even(lines, best, _width(lines, expected))):
        return best
    if expected != " " and _width(lines, " ") and not _width(lines, expected) and not _width(lines[:1], expected):
        return " "
    return expected


def _is_even(lines: list[str], separator: str, least: int) -> bool:
    """Whether all lines, the header too, have the same number of cells, at least two and `least`."""
    cells = {len(row) for row in csv.reader(lines, delimiter=separator)}
    return len(cells) == 1 and min(cells) >= max(2, least)


def _head(content: bytes) -> list[str]:
    lines = content[: 1 << 20].decode("utf-8", errors="ignore").splitlines()
    if len(content) > 1 << 20:
        lines = lines[:-1] or lines  # the last one is cut
    return [line for line in lines if line.strip()][:HEAD]


def _width(lines: list[str], separator: str) -> int:
    """Cells per line where all lines have as many (the header may lack the name above the row names); else 0."""
    try:
        cells = [len(row) for row in csv.reader(lines, delimiter=separator)]
    except csv.Error:
        return 0
    if not cells:
        return 0
    body = set(cells[1:]) or {cells[0]}
    if len(body) > 1:
        return 0
    width = body.pop()
    return width if width > 1 and cells[0] in (width, width - 1) else 0


def read_table(path: Path, subject: str, **options) -> pd.DataFrame:
    """A table of one header or none.

    Parameters
    ----------
    path
        csv, tsv or txt, also ``.gz``; separator, decimal sign and encoding are found, and said where they differ
        from what the ending promises.
    subject
        Names the file in messages.
    options
        Of ``pandas.read_csv``.
    """
    expected = separator_of_ending(path, subject)
    try:
        content, separator = find_separator(read_text(path, subject), path, subject, expected)
        lines = content.count(b"\n")
        content = EMPTY_LINES.sub(b"", content)
        lines -= content.count(b"\n")
        with one_line_without_memory(f"{subject} {path}"):
            table = pd.read_csv(io.BytesIO(content), sep=separator, encoding="utf-8", **options)
    except InputError:
        raise
    except ValueError as error:  # pandas' own errors are
        raise InputError(f"{subject} {path} cannot be read as a table: {' '.join(str(error).split())}") from error
    if options.get("skip_blank_lines") is False:
        table.index += lines  # which messages name
    return decimal_points(table, f"{subject} {path}")
