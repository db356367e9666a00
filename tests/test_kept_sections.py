"""Sections that are kept in the cache, against sections that are read."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sections import make_section

from stexp.data import digests, section_index
from stexp.data.dataset import DataSet
from stexp.data.genes import variable_genes
from stexp.data.kept_sections import keep, open_counts
from stexp.data.readers.samplesheet import COLUMNS, read_samplesheet
from stexp.data.section import Section
from stexp.data.section_index import read_once
from stexp.errors import InputError
from stexp.protocol import Protocol

READER = "stexp.data.readers.samplesheet.read_samplesheet"


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    """Three sections as files; a spot of the second has no counts."""
    rows = []
    for seed, name in enumerate(("A1", "B1", "C1")):
        section = make_section(tmp_path, name, name[0], 30, 20, seed=seed)
        if name == "B1":
            section = make_section(tmp_path, name, "B", 30, 20, counts=np.vstack([np.zeros(20), np.eye(29, 20) + 1]))
        section.spots.write_h5ad(tmp_path / f"{name}.h5ad")
        positions = pd.DataFrame(section.xy_px, columns=["pixel_x", "pixel_y"], index=section.spots.obs_names)
        positions[["array_x", "array_y"]] = section.array_xy
        positions.rename_axis("spot").to_csv(tmp_path / f"{name}.csv")
        rows.append((name, name[0], f"{name}.png", f"{name}.h5ad", f"{name}.csv", 0.5))
    pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(tmp_path / "sheet.csv", index=False)
    return tmp_path / "sheet.csv"


def start(sheet: Path, cache: Path, reads: list[str] | None = None) -> list[Section]:
    """A start of a command: what it reads anew stands in `reads`."""

    def read() -> list[Section]:
        (reads if reads is not None else []).append("read")
        return read_samplesheet(sheet)

    return read_once({"_target_": READER, "sheet": str(sheet)}, cache, read)


def assert_same(ours: Section, theirs: Section) -> None:
    pd.testing.assert_frame_equal(ours.spots.obs, theirs.spots.obs)
    pd.testing.assert_frame_equal(ours.spots.var, theirs.spots.var)
    assert ours.spots.uns == theirs.spots.uns and ours.files == theirs.files
    assert (ours.name, ours.patient, ours.um_per_px) == (theirs.name, theirs.patient, theirs.um_per_px)
    assert ours.image.path == theirs.image.path and ours.spots.X.dtype == theirs.spots.X.dtype
    np.testing.assert_array_equal(ours.spots.X.toarray(), theirs.spots.X.toarray())
    np.testing.assert_array_equal(ours.xy_px, theirs.xy_px)
    np.testing.assert_array_equal(ours.total_counts, theirs.total_counts)
    for _ in range(2):  # made, then read
        np.testing.assert_array_equal(ours.counts(["g03", "no", "g01"]), theirs.counts(["g03", "no", "g01"]))
        pd.testing.assert_series_equal(variable_genes.__wrapped__(ours, 5), variable_genes.__wrapped__(theirs, 5))


def test_a_second_start_reads_nothing_and_has_the_same(sheet, caplog):
    plain = read_samplesheet(sheet)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert any("have no counts" in line for line in said)
    for expected in (["read"], []):
        caplog.clear()
        reads: list[str] = []
        for ours, theirs in zip(start(sheet, sheet.parent / "cache", reads), plain, strict=True):
            assert ours.kept is not None and isinstance(ours.spots.X.data, np.memmap)
            assert_same(ours, theirs)
        assert reads == expected
        again = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert sorted(again) == sorted(said), "what reading said is said once at every start"


def test_an_h5ad_that_others_read_and_tables_of_text(tmp_path):
    section = make_section(tmp_path, image=False)
    section.spots.obs["label"] = [None, "a b", *["tumour"] * 22]
    section.spots.obs["kind"] = pd.Categorical(["x", "y"] * 12)
    section.spots.uns["metadata"] = {"organ": "colon"}
    kept = keep(section, tmp_path)
    assert kept.kept is not None and kept.kept.matrix is kept.spots.X
    pd.testing.assert_frame_equal(kept.spots.obs, section.spots.obs.replace({None: np.nan}))
    assert kept.spots.uns == {"metadata": {"organ": "colon"}}
    np.testing.assert_array_equal(ad.read_h5ad(kept.kept.path).X.toarray(), section.spots.X.toarray())
    assert keep(section, tmp_path).kept.path == kept.kept.path, "named by its content"


@pytest.mark.parametrize("change", ["counts", "patient", "section", "nothing"])
def test_what_changes_is_read_anew(sheet, change):
    cache, reads = sheet.parent / "cache", []
    start(sheet, cache)
    if change == "counts":
        spots = ad.read_h5ad(sheet.parent / "A1.h5ad")
        spots.X.data[0] += 1
        spots.write_h5ad(sheet.parent / "A1.h5ad")
    elif change == "patient":
        sheet.write_text(sheet.read_text().replace("C1,C,", "C1,D,"))
    elif change == "section":
        lines = sheet.read_text().splitlines()
        sheet.write_text("\n".join(lines[:-1]))
    for ours, theirs in zip(start(sheet, cache, reads), read_samplesheet(sheet), strict=True):
        assert_same(ours, theirs)
    assert reads == ([] if change == "nothing" else ["read"])


@pytest.mark.parametrize("damage", ["gone", "cut", "index"])
def test_a_damaged_cache_is_made_anew(sheet, damage):
    cache, reads = sheet.parent / "cache", []
    path = start(sheet, cache)[1].kept.path
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-300])
    else:
        next((cache / "sections").glob("*.json")).write_text('{"roots": [')
    again = start(sheet, cache, reads)
    assert reads == ["read"]
    assert_same(again[1], read_samplesheet(sheet)[1])
    assert_same(start(sheet, cache)[1], again[1])


def test_an_edit_of_the_same_size_and_time_is_seen(sheet):
    cache, before = sheet.parent / "cache", sheet.stat()
    start(sheet, cache)
    sheet.write_text(sheet.read_text().replace("A1,A,", "A1,Z,"))
    os.utime(sheet, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert sheet.stat().st_mtime_ns == before.st_mtime_ns and sheet.stat().st_size == before.st_size
    assert start(sheet, cache)[0].patient == "Z"


@pytest.mark.parametrize("settled", [True, False])
def test_files_that_have_long_been_as_they_are_are_not_hashed_again(sheet, settled, monkeypatch):
    cache, again, hashed = sheet.parent / "cache", [], []
    monkeypatch.setattr(section_index, "SETTLED_S", -3600.0 if settled else 3600.0)
    before = {file: digests.file_digest(file) for section in start(sheet, cache) for file in section.files}
    monkeypatch.setattr(digests, "_digests", {})  # of a new process
    hash_file = digests._hash
    monkeypatch.setattr(digests, "_hash", lambda path, size: hashed.append(path.name) or hash_file(path, size))
    sections = start(sheet, cache, again)
    assert {file: digests.file_digest(file) for section in sections for file in section.files} == before
    assert again == [] and sorted(hashed) == ([] if settled else sorted({file.name for file in before}))
    image, times = sections[0].image.path, sections[0].image.path.stat()
    image.write_bytes(image.read_bytes()[:-1] + b"?")
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digests.file_digest(image) != before[image], "the size and the time that can be set are the same"


def test_files_that_change_places_are_seen_though_size_and_times_are_the_same(tmp_path, monkeypatch):
    """A folder that is renamed changes no time of the files in it, and one command may give many files one time."""
    files = [tmp_path / name / "image.tif" for name in ("A", "B")]
    for file, content in zip(files, (b"one", b"two"), strict=True):
        file.parent.mkdir()
        file.write_bytes(content)

    def states():
        with monkeypatch.context() as patched:
            patched.setattr(Path, "stat", lambda path: SimpleNamespace(**times, st_ino=os.stat(path).st_ino))
            return {digests.state_of(file) for file in files}

    times = {"st_size": 3, "st_mtime_ns": 1, "st_ctime_ns": 1}
    before = states()
    for old, new in (("A", "C"), ("B", "A"), ("C", "B")):
        os.rename(tmp_path / old, tmp_path / new)
    assert len(before) == 2 and before.isdisjoint(states())


@pytest.mark.parametrize(("name", "is_source"), [("train.log", False), (".hidden", False), ("more.csv", True)])
def test_what_no_reader_reads_changes_nothing(sheet, name, is_source):
    reads: list[str] = []
    start(sheet, sheet.parent / "cache")
    (sheet.parent / name).write_text("text")
    start(sheet, sheet.parent / "cache", reads)
    assert reads == (["read"] if is_source else [])


def test_what_changes_while_it_is_read_is_not_on_record(sheet):
    cache = sheet.parent / "cache"

    def read() -> list[Section]:
        sections = read_samplesheet(sheet)
        sheet.write_text(sheet.read_text().replace("A1,A,", "A1,Z,"))
        return sections

    assert read_once({"_target_": READER, "sheet": str(sheet)}, cache, read)[0].patient == "A"
    assert start(sheet, cache)[0].patient == "Z"


def test_a_link_that_leads_nowhere_stops_nothing(sheet):
    (sheet.parent / "broken.svs").symlink_to(sheet.parent / "nowhere")
    reads: list[str] = []
    for _ in range(2):
        start(sheet, sheet.parent / "cache", reads)
    assert reads == ["read"]


def test_a_kept_file_of_zeros_is_written_again(sheet):
    cache = sheet.parent / "cache"
    for _ in range(2):
        first = start(sheet, cache)[0]
        assert first.kept is not None and first.spots.X.sum() > 0
        path = first.kept.path
        size = path.stat().st_size
        path.unlink()
        path.write_bytes(bytes(size))


def test_what_is_made_of_some_spots_is_kept_for_these_spots_alone(tmp_path, monkeypatch):
    section = make_section(tmp_path, "A1", "A", 40, 60, seed=3)
    kept, rng = keep(section, tmp_path), np.random.default_rng(0)
    masks = [rng.random(40) < 0.6 for _ in range(2)]
    expected = [variable_genes.__wrapped__(section.take(mask), 20) for mask in masks]
    assert not expected[0].equals(expected[1])
    for mask, genes in zip(masks, expected, strict=True):
        part = kept.take(mask)
        pd.testing.assert_series_equal(variable_genes.__wrapped__(part, 20), genes)
        np.testing.assert_array_equal(part.total_counts, section.take(mask).total_counts)
    again = [keep(section, tmp_path).take(mask) for mask in masks]
    # of a part of a part, too, which is another one than the same numbers of the whole
    inner = np.arange(masks[0].sum()) % 2 == 0
    twice, first = np.zeros(40, bool), np.flatnonzero(masks[0])
    twice[first[inner]] = True
    pd.testing.assert_series_equal(
        variable_genes.__wrapped__(again[0].take(inner), 20), variable_genes.__wrapped__(section.take(twice), 20)
    )
    monkeypatch.setattr("stexp.data.genes._most_variable", lambda *_: pytest.fail("calculated again"))
    for part, genes in zip(again, expected, strict=True):
        pd.testing.assert_series_equal(variable_genes.__wrapped__(part, 20), genes)


def test_a_damaged_table_beside_the_counts_is_made_anew(tmp_path):
    section = make_section(tmp_path, image=False)
    kept = keep(section, tmp_path)
    first = kept.counts(["g05", "g02"])
    path = next(tmp_path.glob("*-panel-*.npz"))
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:120] + bytes([whole[120] ^ 255]) + whole[121:]):
        path.write_bytes(damaged)
        np.testing.assert_array_equal(kept.counts(["g05", "g02"]), first)
    assert path.read_bytes() == whole


def test_counts_are_not_read_where_only_the_panel_is(tmp_path, monkeypatch):
    kept = keep(make_section(tmp_path, image=False), tmp_path)
    expected = kept.counts(["g05"])
    spots, counts = open_counts(kept.kept.path)
    counts.matrix.data = counts.matrix.indices = None  # whoever looks at them fails
    again = Section("A1", "A", spots, kept=counts)
    np.testing.assert_array_equal(again.counts(["g05"]), expected)
    assert again.total_counts.sum() == kept.spots.X.sum()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_counts_that_were_let_go_take_no_memory_and_are_read_again(tmp_path):
    counts = np.random.default_rng(0).integers(0, 5, (2000, 1000))
    kept = keep(make_section(tmp_path, n=2000, genes=1000, image=False, counts=counts), tmp_path)
    taken = []
    for _ in range(2):
        kept.kept.let_go()
        taken.append(_mapped_kb())
        np.testing.assert_array_equal(kept.spots.X.sum(axis=0), counts.sum(axis=0)[None])
        taken.append(_mapped_kb())
    assert min(taken[1], taken[3]) - taken[2] > 4_000


def _mapped_kb() -> int:
    """Memory of this process that is of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))


def test_other_spots_are_not_taken_for_those_of_the_file(tmp_path):
    kept = keep(make_section(tmp_path, image=False), tmp_path)
    some = kept.take(np.arange(len(kept)) % 2 == 0)
    assert len(some) == 12 and some.kept is not None and some.kept.part
    assert replace(some, spots=some.spots.copy()).kept is None, "the counts may be others"
    np.testing.assert_array_equal(some.total_counts, kept.total_counts[::2])
    assert kept.take(np.ones(len(kept), bool)).kept is kept.kept


def test_without_a_place_sections_stay_in_memory(sheet, tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert all(section.kept is None for section in start(sheet, blocked))
    reads: list[str] = []
    assert read_once({"_target_": "plugin.read"}, tmp_path / "c", lambda: reads.append("read") or []) == []
    assert reads == ["read"] and not (tmp_path / "c" / "sections").is_file()


def test_the_first_error_of_the_sheet_is_raised(sheet):
    for name in ("B1", "C1"):
        (sheet.parent / f"{name}.h5ad").write_bytes(b"no")
    config = {"name": "x", "sections": None, "cache_dir": str(sheet.parent / "cache")}
    with pytest.raises(InputError, match="line 3: column counts"):
        DataSet({**config, "reader": {"_target_": READER, "sheet": str(sheet)}}).read_sections(Protocol("strict"))
