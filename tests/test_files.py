"""Files that are whole or not there, and tables that no spreadsheet computes."""

from __future__ import annotations

import csv
import errno
import gzip
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stexp.files import append_csv, defuse, naming, replacing, restore, table_file, write_atomically, write_csv

FORMULAS = ["=1+1", "+cmd", "-x", "@SUM(A1)", "\t=1", "\r=1", " =1", "\n@x", "'=1", "''-x"]


@pytest.mark.parametrize("text", FORMULAS)
def test_text_that_would_be_computed_is_not(text: str) -> None:
    assert defuse(text) == f"'{text}" and restore(defuse(text)) == text


@pytest.mark.parametrize("cell", [-1.5, 3, True, None, "-1.5", "+2e-3", "FASN", "HLA-A", "a=b", "", "'quoted'"])
def test_other_cells_stay_as_they_are(cell: object) -> None:
    assert defuse(cell) is cell


@given(st.text("'=+-@ \ta1.", max_size=6), st.text("'=+-@ \ta1.", max_size=6))
def test_every_text_comes_back_and_no_two_become_one(first: str, second: str) -> None:
    assert restore(defuse(first)) == first
    assert (defuse(first) == defuse(second)) == (first == second)


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_a_table_is_defused_in_cells_columns_and_index(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {"=gene": pd.Categorical(["@a", "b"]), "value": [-0.123456789, np.nan], "flag": [True, False]},
        index=["-s1", "s2"],
    )
    write_csv(table, tmp_path / "table.csv", index="spot")
    assert rows_of(tmp_path / "table.csv") == [
        ["spot", "'=gene", "value", "flag"],
        ["'-s1", "'@a", "-0.123457", "True"],
        ["s2", "b", "", "False"],
    ]
    write_csv(table, tmp_path / "table.csv")
    assert rows_of(tmp_path / "table.csv")[1][0] == "'@a"
    assert table.columns[0] == "=gene" and table.index[0] == "-s1"  # the caller's table is as it was


def test_columns_of_one_name_stay_apart(tmp_path: Path) -> None:
    write_csv(pd.DataFrame([["a", 1.5]], columns=["x", "x"]), tmp_path / "table.csv")
    assert rows_of(tmp_path / "table.csv") == [["x", "x"], ["a", "1.5"]]


def test_a_table_in_parts_is_that_of_one_part(tmp_path: Path) -> None:
    table = pd.DataFrame({"name": list("abcde"), "value": np.arange(5) / 3})
    write_csv(table, tmp_path / "whole.csv.gz")
    with table_file(tmp_path / "parts.csv.gz") as file:
        for start in range(0, 5, 2):
            append_csv(table.iloc[start : start + 2], file, header=start == 0)
    assert (tmp_path / "whole.csv.gz").read_bytes() == (tmp_path / "parts.csv.gz").read_bytes()
    assert gzip.decompress((tmp_path / "whole.csv.gz").read_bytes()).startswith(b"name,value\na,0\n")


def test_what_fails_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as part:
        part.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old" and [each.name for each in tmp_path.iterdir()] == ["file.txt"]


def test_writers_at_one_time_have_names_of_their_own(tmp_path: Path) -> None:
    path, texts = tmp_path / "file.txt", [str(i) * 100_000 for i in range(4)]
    threads = [threading.Thread(target=write_atomically, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts and [each.name for each in tmp_path.iterdir()] == ["file.txt"]


def test_an_error_without_a_name_gets_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    with pytest.raises(OSError, match=rf"File too large: '{path}'"), replacing(path):
        raise OSError(errno.EFBIG, "File too large")
    with pytest.raises(OSError, match=rf"no room: '{path}'"), replacing(path) as part:
        raise OSError(errno.ENOSPC, "no room", str(part))
    with pytest.raises(OSError, match=rf"10 requested.*: '{path}'"), replacing(path):
        raise OSError("10 requested and 3 written")  # as numpy has it
    with pytest.raises(FileNotFoundError, match="of another file"), replacing(path):
        raise FileNotFoundError(errno.ENOENT, "No such file", "of another file")
    with pytest.raises(PermissionError, match=f"'{path}/inner'"), naming(path, tmp_path / "part"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "part" / "inner"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="whether a process lives is not asked there")
def test_what_a_killed_process_left_of_a_file_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    code = "import os, sys; from pathlib import Path; from stexp.files import replacing\n"
    code += "with replacing(Path(sys.argv[1])) as part: part.write_text('half'); os._exit(9)"
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with replacing(path) as part:  # this process is alive: another writer of the file leaves its part alone
        part.write_text("whole")
        write_atomically(path, "other")
        assert part.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"] and path.read_text() == "whole"


@pytest.mark.parametrize("reason", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_disk_that_takes_nothing_is_said_with_the_name_of_the_file(tmp_path, monkeypatch, reason):
    def refuse(path, *_, **__):
        raise OSError(reason, os.strerror(reason), str(path))

    for name in ("open", "write_text", "unlink"):  # unlink, too: on a read-only disk it fails where nothing is
        monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(OSError) as caught:
        write_atomically(tmp_path / "report.html", "x")
    assert caught.value.errno == reason and caught.value.filename == str(tmp_path / "report.html")
