"""Copies of a section under another name: identical, re-ordered, renamed, cropped, or with its image encoded anew."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from PIL import Image

from stexp.data.digests import file_digest
from stexp.data.section import Section
from stexp.errors import InputError

TOP = 30
"""Largest counts of a spot that tell it from others: what is left when rare genes were filtered."""
FEWEST_VALUES = 10
"""Different values among them below which spots of different tissue agree by chance.

With ten, fewer than 1 in 1000 spots of two independent sections of 20,000 and 4,000 spots agreed, whatever their depth
(200 to 2000 counts) and genes were; a third of the spots of the shallowest sections of her2st have them.
"""
SHARE = 0.2
FEWEST_SPOTS = 5
"""Of the smaller section's spots, so many must be in the other one, and at least so many."""
N_BITS = 112
"""Of a tile's hash, see `tile_prints`."""
BITS = 6
"""Of these, that may differ after encoding anew."""
SAMPLED = 64
"""Spots of a section that are kept on record, to know it again where it is not at hand."""
AT_ONCE = 1 << 22
"""Pairs of tiles that are compared at once."""
PLAIN = 4.0
"""Standard deviation of grey levels below which a tile shows nothing to tell it by."""


@dataclass(frozen=True)
class Copy:
    """Two sections that share spots.

    Parameters
    ----------
    first, second
        Names of the sections.
    share
        Of the spots of the smaller one that can be told apart, how many are in the other.
    by
        ``counts`` or ``tiles``.
    """

    first: str
    second: str
    share: float
    by: str

    def in_words(self) -> str:
        return f"{self.first} and {self.second} ({self.share:.0%} of the spots, by {self.by})"


def copies_by_counts(sections: Sequence[Section]) -> list[Copy]:
    """Pairs of sections with the same counts in a fifth of their spots or more.

    A spot is known by its 30 largest counts in falling order, whatever the genes and the spot are called and in
    whichever order they come; spots that many could be are left out, see `count_prints`.
    """
    return _copies({section.name: prints_of(section) for section in sections}, "counts")


def prints_of(section: Section) -> np.ndarray:
    """`count_prints` of a section, (n_spots,) uint64."""
    return section.made("prints", lambda: {"prints": count_prints(section.spots.X)})["prints"]


def count_prints(counts: sp.csr_matrix) -> np.ndarray:
    """Hash of the largest counts of every spot, (N,) uint64; 0 for spots that cannot be told from others.

    Those are spots whose largest counts have fewer than ten values, and spots that look like another of their section.
    """
    prints = np.zeros(counts.shape[0], dtype=np.uint64)
    for spot, (start, end) in enumerate(zip(counts.indptr, counts.indptr[1:], strict=False)):
        row = counts.data[start:end]
        top = np.sort(row if len(row) <= TOP else np.partition(row, len(row) - TOP)[-TOP:])[::-1]
        if np.count_nonzero(np.diff(top)) + 1 >= FEWEST_VALUES:
            digest = hashlib.blake2b(top.astype(np.float32).tobytes(), digest_size=8).digest()
            prints[spot] = np.frombuffer(digest, dtype=np.uint64)[0]
    _, which, times = np.unique(prints, return_inverse=True, return_counts=True)
    prints[times[which] > 1] = 0
    return prints


def tile_prints(tiles: Iterable[np.ndarray]) -> np.ndarray:
    """Bits of every tile, (N, 112) bool: whether brightness rises from one field of an 8 x 8 raster to the next one.

    Right and below; it stays nearly the same when an image is encoded anew, resized or its contrast changed. Tiles
    without structure have no bit set.
    """
    rows = []
    for tile in tiles:
        grey = Image.fromarray(np.asarray(tile)).convert("L")
        field = np.asarray(grey.resize((8, 8), Image.Resampling.BOX), dtype=np.float64)
        bits = np.concatenate([(np.diff(field, axis=1) > 0).ravel(), (np.diff(field, axis=0) > 0).ravel()])
        rows.append(bits & (field.std() >= PLAIN))
    return np.array(rows, dtype=bool).reshape(-1, N_BITS)


def record_spots(counts: np.ndarray, tiles: np.ndarray | None) -> dict[str, list[str]]:
    """Hashes of 64 spots of a section, as hexadecimal text: ``counts`` and, where there are tiles, ``tiles``.

    Parameters
    ----------
    counts, tiles
        `count_prints` (N,) and `tile_prints` (N, 112); evenly over the spots that can be told from others.
    """
    kept = {"counts": [f"{value:016x}" for value in _spread(counts[counts > 0])]}
    if tiles is not None:
        kept["tiles"] = [np.packbits(bits).tobytes().hex() for bits in _spread(tiles[tiles.any(axis=1)])]
    return kept


def spots_on_record(record: Mapping[str, Any], counts: np.ndarray, tiles: np.ndarray | None = None) -> str | None:
    """By what a section is the one of a record of `record_spots`: ``counts`` or ``tiles``; None where it is another."""
    recorded = np.array([int(text, 16) for text in record.get("counts", ())], dtype=np.uint64)
    if _is_copy(int(np.isin(recorded, counts).sum()), len(recorded)):
        return "counts"
    if tiles is not None and len(record.get("tiles", ())):
        packed = np.frombuffer(bytes.fromhex("".join(record["tiles"])), dtype=np.uint8)
        kept = np.unpackbits(packed.reshape(len(record["tiles"]), -1), axis=1).astype(bool)
        if _is_copy(_alike(kept, tiles[tiles.any(axis=1)]), len(kept)):
            return "tiles"
    return None


def files_on_record(record: Mapping[str, Mapping[str, str]], sections: Sequence[Section]) -> dict[str, set[str]]:
    """Section -> those of a record that it is by the content of a file.

    Files that several sections have tell none of them, on record or here: a sheet, or the table of a SpatialData store.

    Parameters
    ----------
    record
        Section -> file -> :func:`~stexp.data.digests.file_digest`.
    """
    recorded = Counter(digest for files in record.values() for digest in set(files.values()))
    own = {section.name: {file_digest(path) for path in section.files} for section in sections}
    times = Counter(digest for digests in own.values() for digest in digests)
    alone = {name: {each for each in digests if times[each] == recorded[each] == 1} for name, digests in own.items()}
    matches = {
        name: {other for other, files in record.items() if not digests.isdisjoint(files.values())}
        for name, digests in alone.items()
    }
    return {name: others for name, others in matches.items() if others}


def _spread(values: np.ndarray) -> np.ndarray:
    return values[np.unique(np.linspace(0, len(values) - 1, min(SAMPLED, len(values))).astype(int))]


def _is_copy(same: int, of: int) -> bool:
    return same >= max(FEWEST_SPOTS, SHARE * of)


def _alike(few: np.ndarray, many: np.ndarray) -> int:
    """How many of some tiles' bits (n, 112) are those of others (m, 112), but for a few that encoding changes."""
    if not len(few) or not len(many):
        return 0
    few, many = few.astype(np.float32), many.astype(np.float32)
    in_many, same = many.sum(axis=1), 0
    for part in np.array_split(few, -(-len(few) * len(many) // AT_ONCE)):
        # bits that differ, by one product: |a| + |b| - 2ab
        differ = part.sum(axis=1)[:, None] + in_many - 2 * part @ many.T
        same += int((differ.min(axis=1) <= BITS).sum())
    return same


def copies_by_tiles(prints: dict[str, np.ndarray], held_out: Collection[str] | None = None) -> list[Copy]:
    """Pairs of sections whose tiles look the same in a fifth of their spots or more; `tile_prints` by section.

    Parameters
    ----------
    held_out
        Sections one of which is in every pair; None: all pairs, of which there are many.
    """
    copies = []
    telling = {name: bits[bits.any(axis=1)] for name, bits in prints.items()}
    for first, second in combinations(telling, 2):
        if held_out is not None and first not in held_out and second not in held_out:
            continue
        few, many = sorted((telling[first], telling[second]), key=len)
        same = _alike(few, many)
        if _is_copy(same, len(few)):
            copies.append(Copy(first, second, same / len(few), "tiles"))
    return copies


def _copies(prints: dict[str, np.ndarray], by: str) -> list[Copy]:
    names = list(prints)
    telling = [np.unique(values[values > 0]) for values in prints.values()]
    sizes = np.array([len(values) for values in telling])
    values, of = np.concatenate(telling), np.repeat(np.arange(len(names)), sizes)
    order = np.lexsort((of, values))
    values, of = values[order], of[order]
    same: Counter[tuple[int, int]] = Counter()
    starts = np.flatnonzero(np.diff(values, prepend=0))
    n = np.diff(starts, append=len(values))
    for start, size in zip(starts[n > 1].tolist(), n[n > 1].tolist(), strict=True):
        same.update(combinations(of[start : start + size].tolist(), 2))
    return [
        Copy(names[i], names[j], n / min(sizes[i], sizes[j]), by)
        for (i, j), n in sorted(same.items())
        if _is_copy(n, min(sizes[i], sizes[j]))
    ]


def copies_in_fold(copies: Iterable[Copy], spots: pd.DataFrame, allowed: bool) -> list[Copy]:
    """The pairs of which one section is held out, and the other trains, validates or is retrieved from.

    Parameters
    ----------
    spots
        ``section`` and ``role`` of every spot.

    Raises
    ------
    InputError
        There is one, and it is not `allowed`.
    """
    is_test = spots["role"] == "test"
    test, other = (set(spots["section"][rows]) for rows in (is_test, ~is_test))
    sides = ((test, other), (other, test))
    across = [copy for copy in copies if any(copy.first in a and copy.second in b for a, b in sides)]
    if across and not allowed:
        one = across[0]
        raise InputError(
            f"sections {one.first} and {one.second} are copies by their {one.by} ({one.share:.0%} of the spots), and "
            f"one is held out while the other trains: no score would mean anything; leave one out (data.sections=), "
            f"or data.allow_duplicates=true, which the audit counts as a leak"
        )
    return across
