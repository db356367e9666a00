"""Tables as people's programs write them."""

from __future__ import annotations

import codecs
import gzip
import itertools
import logging
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stexp.data.readers import memory
from stexp.data.readers.count_tables import read_count_table
from stexp.data.readers.formats import read_counts, read_positions
from stexp.data.readers.text import read_table, read_text
from stexp.errors import InputError

SEPARATORS = {",": ".csv", ";": ".csv", "\t": ".tsv", "|": ".csv", " ": ".txt"}
ENCODINGS = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "cp1252": b"",
}
COUNTS = pd.DataFrame(
    [[3, 0, 12], [0, 5, 100], [1, 0, 7]], index=["spot é", "s2", "s3"], columns=["ACTB", "CD3E", "CD74"]
)
BYTES = [b"a", b"1", b",", b";", b"\t", b"\n", b"\x22", b"\r", b"\0", b"\xe9", b"."]
POSITIONS = pd.DataFrame(
    {"array_x": [0, 1, 2], "array_y": [0, 0, 1], "pixel_x": [10.5, 20.25, 1030.0], "pixel_y": [0.5, 1.5, 2.5]},
    index=pd.Index(["é", "b", "c"], name="spot"),
)


@settings(max_examples=80, deadline=None)
@given(
    separator=st.sampled_from(list(SEPARATORS)),
    ending=st.sampled_from([".csv", ".tsv", ".txt"]),
    encoding=st.sampled_from(list(ENCODINGS)),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    quoting=st.sampled_from([0, 1, 2]),
    packed=st.booleans(),
    decimal=st.sampled_from([".", ","]),
)
def test_positions_and_counts_are_the_same_however_they_are_written(
    tmp_path_factory, separator, ending, encoding, newline, quoting, packed, decimal
):
    folder = tmp_path_factory.mktemp("t")
    options = {"sep": separator, "lineterminator": newline, "quoting": quoting}
    for name, table in (
        ("counts", COUNTS.astype(float if decimal == "," else int)),
        ("positions", POSITIONS),
    ):
        content = ENCODINGS[encoding] + table.to_csv(decimal=decimal, **options).encode(encoding)
        path = folder / f"{name}{ending}{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(content) if packed else content)
        if name == "counts":
            counts = read_counts(path)
            assert list(counts.obs_names) == list(COUNTS.index) and list(counts.var_names) == list(COUNTS.columns)
            np.testing.assert_array_equal(counts.X.toarray(), COUNTS)
        else:
            pd.testing.assert_frame_equal(read_positions(path), POSITIONS.astype(float), check_names=False)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b";A;B\ns;1;2\n", "is separated by semicolons, not by commas"),
        (b"\tA\tB\ns\t1\t2\n", "is separated by tabs, not by commas"),
        (b"sep=;\n;A;B\ns;1;2\n", "is separated by semicolons"),
        (";A;B\nä;1;2\n".encode("latin-1"), "is not UTF-8; read as Windows-1252"),
        (b";A;B\ns;1,0;2,0\n", r"has decimal commas \(1,0\)"),
        (codecs.BOM_UTF16_LE + ",A,B\ns,1,2\n".encode("utf-16-le"), "is UTF-16-LE"),
        (",A,B\ns,1,2\n".encode("utf-16-le"), "is UTF-16-LE"),
    ],
)
def test_what_is_found_is_said(tmp_path, caplog, content, said):
    caplog.set_level(logging.INFO)
    (tmp_path / "c.csv").write_bytes(content)
    np.testing.assert_array_equal(read_counts(tmp_path / "c.csv").X.toarray(), [[1, 2]])
    assert pd.Series([caplog.text]).str.contains(said).all(), caplog.text


def test_a_table_as_its_ending_says_is_not_spoken_of(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "c.csv").write_text(",A,B;C\ns,1,2\n")  # a semicolon within a name
    assert list(read_counts(tmp_path / "c.csv").var_names) == ["A", "B;C"]
    assert not caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (";A;B\ns;1,000;2\n", "in 1,000 the comma may divide thousands or be a decimal sign"),
        (';A;B\n"s";"12,345";2\n', "in 12,345 the comma"),
        (",A\ns,TRUE\n", "1 columns hold text .first: 'True' in the row s"),
        ("A\n1\n2\n", "have one column .'A'.; names in the first row and column, and cells divided by commas"),
        ("", "are empty"),
        ("\n", "are empty"),
        (",A,B\n", "are empty"),
    ],
)
def test_cells_that_may_mean_two_things_are_refused_with_their_cause(tmp_path, content, message):
    (tmp_path / "c.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        read_counts(tmp_path / "c.csv")


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (["1,800", "800"], ["800,0", "2,5"]),  # decimal commas of another column are no proof
        (["1.800", "800"], ["800", "900"]),
        (["1.800", "2.300"], ["1.400", "1.500"]),
        (["12.345", "0"], ["1.5", "2.5"]),
        (["1.234.567", "8"], ["7", "7"]),
    ],
)
@pytest.mark.parametrize("separator", [";", "\t"])
@pytest.mark.parametrize("kind", ["columns", "visium"])
def test_positions_that_may_be_a_thousand_times_too_small_are_refused(tmp_path, x, y, separator, kind):
    table = pd.DataFrame({"spot": ["a", "b"], "array_x": [0, 1], "array_y": 0, "pixel_x": x, "pixel_y": y})
    if kind == "visium":
        table.insert(1, "in_tissue", 1)
        table = table.rename(columns={"spot": "barcode", "array_x": "array_col", "array_y": "array_row"})
        table = table.rename(columns={"pixel_x": "pxl_col_in_fullres", "pixel_y": "pxl_row_in_fullres"})
    table.to_csv(tmp_path / "p.csv", sep=separator, index=False)
    column = "pxl_col_in_fullres" if kind == "visium" else "pixel_x"
    sign = "comma" if "," in x[0] else "point"
    with pytest.raises(InputError, match=rf"in {x[0]} the {sign} may divide thousands .*column {column}"):
        read_positions(tmp_path / "p.csv")


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1.125", "2.5"], [1.125, 2.5]),
        (["1,125", "2,5"], [1.125, 2.5]),
        (["1.125", "1800"], [1.125, 1800]),
        (["1.125", "0.125"], [1.125, 0.125]),
        (["1.125", "1800.125"], [1.125, 1800.125]),
        (["1.12", "2.00"], [1.12, 2]),
        (["1 800", "2 000"], [1800, 2000]),
        (["1'800", "2’000"], [1800, 2000]),
        (["1\u202f800,5", "2\u00a0000,25"], [1800.5, 2000.25]),
        (["1\u2009800.5", "20.25"], [1800.5, 20.25]),
    ],
)
def test_numbers_that_can_mean_one_thing_only(tmp_path, cells, values):
    table = pd.DataFrame({"spot": ["a", "b"], "array_x": [0, 1], "array_y": 0, "pixel_x": cells, "pixel_y": [7, 8]})
    table.to_csv(tmp_path / "p.csv", sep=";", index=False)
    assert read_positions(tmp_path / "p.csv")["pixel_x"].tolist() == values


def test_corrected_places_on_the_array_have_three_decimals(tmp_path):
    (tmp_path / "p.tsv").write_text("x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\n4\t5\t4.125\t4.993\t10.5\t7\n")
    assert read_positions(tmp_path / "p.tsv").loc["4x5", ["new_x", "new_y"]].tolist() == [4.125, 4.993]


@pytest.mark.parametrize("cell", ["3.000", "1.234", "12.345", "1,234", "3,000", "1 234", "1'234"])
@pytest.mark.parametrize("separator", [";", "\t", ","])
def test_counts_with_thousands_are_refused(tmp_path, cell, separator):
    pd.DataFrame({"A": ["0", "5", cell], "B": ["3", "7", "0"]}, index=list("stu")).to_csv(
        tmp_path / "c.csv", sep=separator
    )
    with pytest.raises(InputError, match=rf"column A.*\b{cell}|{cell}.*column A"):
        read_counts(tmp_path / "c.csv")


@pytest.mark.parametrize("sign", [".", ","])
def test_counts_of_three_decimals_are_counts(tmp_path, sign):
    (tmp_path / "c.tsv").write_text("\tA\tB\ns\t3.000\t5.000\nt\t12.000\t0.000\n".replace(".", sign))
    assert read_counts(tmp_path / "c.tsv").X.toarray().tolist() == [[3, 5], [12, 0]]


def test_a_measure_with_three_decimals_beside_counts_is_left_out(tmp_path):
    (tmp_path / "c.csv").write_text(",A,B,pct_mt\ns,3,5,12.345\nt,1,0,3.5\n")
    assert list(read_counts(tmp_path / "c.csv").var_names) == ["A", "B"]


# headers that do not fit the rows


NAMES = {"human": ["ACTB", "C1orf112", "CD74", "HLA-A"], "mouse": ["Xkr4", "Gm1992", "mt-Co1", "0610005C09Rik"]}


@pytest.mark.parametrize("names", list(NAMES.values()))
@pytest.mark.parametrize("separator", [",", ";", "\t", " "])
def test_a_header_as_r_writes_it(tmp_path, caplog, names, separator):
    caplog.set_level(logging.INFO)
    lines = [separator.join(f'"{name}"' for name in names), separator.join(['"s1"', "1", "2", "3", "4"])]
    (tmp_path / "c.txt").write_text("\n".join(lines))
    counts = read_counts(tmp_path / "c.txt")
    assert list(counts.var_names) == names and counts.X.toarray().tolist() == [[1, 2, 3, 4]]
    assert "as write.table of R leaves it" in caplog.text


@pytest.mark.parametrize(
    "corner",
    ["spot", "", "Barcode", "gene", "Gene_ID", "GeneSymbol", "id", "X", "Spots", "cell.id", "sample", "My spots"],
)
@pytest.mark.parametrize("names", list(NAMES.values()))
def test_a_header_that_lacks_the_name_of_a_gene_is_refused(tmp_path, corner, names):
    lines = [",".join([corner, *names[:-1]]), *(f"s{i},1,2,3,4" for i in range(3))]
    (tmp_path / "c.csv").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"4 names in the header .*, 5 cells in the row 's0'; a name for every column"):
        read_counts(tmp_path / "c.csv")


@pytest.mark.parametrize("header", ["geneset,AAACAAGTAT-1,AAACACCAAT-1", "foo,10x12,11x12"])
def test_a_corner_is_unlike_the_spots_beside_it(tmp_path, header):
    (tmp_path / "c.csv").write_text(f"{header}\nACTB,1,2,3\nCD74,1,2,3\n")
    with pytest.raises(InputError, match="3 names in the header"):
        read_counts(tmp_path / "c.csv")


@pytest.mark.parametrize("header", ["spot,A,B,C,D", "spot,A"])
def test_a_header_of_other_width_is_refused(tmp_path, header):
    (tmp_path / "c.csv").write_text(f"{header}\ns,1,2,3\n")
    with pytest.raises(InputError, match="names in the header"):
        read_counts(tmp_path / "c.csv")


# line ends and empty lines


@pytest.mark.parametrize(
    "content",
    ["\n,A,B\ns,1,2\n", ",,\n,,\n,A,B\ns,1,2\n", ",A,B\rs,1,2\r\n", ",A,B\r\r\ns,1,2\r\r\n", ",A,B\rs,1,2\n",
     "\r\n,A,B\r\ns,1,2"],
)  # fmt: skip
def test_line_ends_and_empty_lines_of_any_kind(tmp_path, content):
    (tmp_path / "c.csv").write_bytes(content.encode())
    assert read_counts(tmp_path / "c.csv").X.toarray().tolist() == [[1, 2]]
    content = content.replace(",A,B", "spot,array_x,array_y,pixel_x,pixel_y").replace("s,1,2", "s,1,2,3,4")
    (tmp_path / "p.csv").write_bytes(content.encode())
    assert read_positions(tmp_path / "p.csv").loc["s"].tolist() == [1, 2, 3, 4]


def bomb(path, megabytes: int) -> None:
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(megabytes):
            file.write(bytes(1 << 20))


def test_a_gzip_bomb_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    bomb(tmp_path / "c.tsv.gz", 64)
    monkeypatch.setattr(memory, "free_on_machine", lambda: 30_000_000)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"c.tsv.gz unpacks to more than 0.0 GB, which is what the free memory allows"):
        read_counts(tmp_path / "c.tsv.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30_000_000


def test_several_members_and_padding_of_gzip_are_read(tmp_path):
    parts = [gzip.compress(part) for part in (b",A,B\n", b"s,1,2\n", b"t,3,4\n")]
    (tmp_path / "c.csv.gz").write_bytes(b"".join(parts) + bytes(100))
    assert read_counts(tmp_path / "c.csv.gz").X.toarray().tolist() == [[1, 2], [3, 4]]
    for cut in (5, len(parts[0]) + 4, sum(map(len, parts)) - 4):
        (tmp_path / "c.csv.gz").write_bytes(b"".join(parts)[:cut])
        with pytest.raises(InputError, match=r"cannot be read .*; fetch the file again"):
            read_counts(tmp_path / "c.csv.gz")


def test_a_text_without_room_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "c.csv").write_text(",A\n" + "s,1\n" * 1000)
    monkeypatch.setattr(memory, "free_on_machine", lambda: 1000)
    for read in (read_count_table, lambda path: read_table(path, "counts"), lambda path: read_text(path, "counts")):
        with pytest.raises(InputError, match=r"needs about 0.0 GB of memory, 0.0 GB are free") as caught:
            read(tmp_path / "c.csv")
        assert "\n" not in str(caught.value)


def test_memory_errors_are_one_line():
    with (
        pytest.raises(InputError, match="counts x does not fit into memory"),
        memory.one_line_without_memory("counts x"),
    ):
        raise MemoryError


def test_the_bound_of_a_container_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    free = memory.free_memory()
    assert free > 0
    for bound, used, expected in (("max", "5", None), ("1000", "400", 600), ("1000", "2000", 0)):
        (tmp_path / "memory.max").write_text(bound)
        (tmp_path / "memory.current").write_text(used)
        assert memory.free_memory() == expected if expected is not None else memory.free_memory() > 1000


@settings(max_examples=60, deadline=None)
@given(content=st.lists(st.sampled_from(BYTES), max_size=40))
def test_any_text_is_read_or_refused_in_one_line(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("t") / "c.csv"
    path.write_bytes(b"".join(content))
    for read in (read_counts, read_positions):
        try:
            read(path)
        except InputError as error:
            assert "\n" not in str(error)


def test_the_names_of_one_row_say_where_a_table_ends(tmp_path):
    for separator, ending in itertools.product(",;\t", (".csv", ".tsv")):
        path = tmp_path / f"c{ending}"
        path.write_text(separator.join(["", "A", "B", ""]) + "\n" + separator.join(["s", "1", "2", ""]) + "\n")
        assert list(read_counts(path).var_names) == ["A", "B"]


@pytest.mark.parametrize("separator", [";", "\t", "|"])
@pytest.mark.parametrize("decimal", [".", ","])
def test_positions_of_spaceranger_without_a_header(tmp_path, separator, decimal):
    rows = [["AAACAAGT-1", "1", "2", "4", "10.5", "20.5"], ["AAACAAGC-1", "1", "3", "5", "11.0", "21.5"]]
    lines = [separator.join(cell.replace(".", decimal) for cell in row) for row in rows]
    (tmp_path / "tissue_positions_list.csv").write_text("".join(f"{line}\n" for line in lines))
    positions = read_positions(tmp_path / "tissue_positions_list.csv")
    assert positions.loc["AAACAAGT-1"].tolist() == [4, 2, 20.5, 10.5]
