"""Gene names: ids to symbols, versions, sums, species."""

from __future__ import annotations

import gzip
import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from stexp.data.gene_names import harmonise
from stexp.errors import InputError

TP53, CD74, ACTB, MOUSE = "ENSG00000141510", "ENSG00000019582", "ENSG00000075624", "ENSMUSG00000024610"
TABLE = f"Gene stable ID,Gene name\n{TP53},TP53\n{CD74},CD74\n{ACTB},ACTB\n"


def counts_of(names, ids=None, values=None):
    values = np.arange(1, 2 * len(names) + 1).reshape(2, len(names)) if values is None else np.asarray(values)
    var = pd.DataFrame(index=pd.Index(names, dtype=object))
    if ids is not None:
        var["gene_ids"] = ids
    return ad.AnnData(sp.csr_matrix(values.astype(np.float32)), obs=pd.DataFrame(index=["s1", "s2"]), var=var)


@pytest.fixture
def table(tmp_path):
    (tmp_path / "genes.csv").write_text(TABLE)
    return tmp_path / "genes.csv"


def test_without_a_table_ids_lose_their_version_and_symbols_stay():
    found = harmonise(counts_of([f"{TP53}.18", CD74, "FO538757.1", "HLA-A", "mt-Co1"]))
    assert list(found.var_names) == [TP53, CD74, "FO538757.1", "HLA-A", "mt-Co1"]
    assert list(found.var["gene_ids"]) == [TP53, CD74, "", "", ""]
    np.testing.assert_array_equal(found.X.toarray(), [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])


def test_ids_become_symbols_and_the_rest_keeps_its_name(table, caplog):
    caplog.set_level(logging.INFO)
    names = [f"{CD74}.3", "ENSG00000000001.2", TP53, "MALAT1"]
    found = harmonise(counts_of(names), table, "section S1")
    assert list(found.var_names) == ["CD74", "ENSG00000000001", "TP53", "MALAT1"]
    assert list(found.var["gene_ids"]) == [CD74, "ENSG00000000001", TP53, ""]
    report = {"given": 4, "ids": 3, "matched": 2, "unmatched": 1, "summed": 0, "left_out": 0}
    assert found.uns["gene_names"] == report
    (line,) = caplog.messages
    for words in ("section S1", "4 gene names", "3 with an id", "2 in genes.csv", "1 not", "0 summed"):
        assert words in line


def test_nothing_is_said_where_nothing_was_done_and_the_input_is_left_alone(caplog, table):
    caplog.set_level(logging.INFO)
    given_counts = counts_of(["TP53", "CD74"])
    harmonise(given_counts)
    assert caplog.messages == []
    harmonise(counts := counts_of([f"{TP53}.1", TP53]), table)
    assert (
        list(counts.var_names) == [f"{TP53}.1", TP53]
        and "gene_ids" not in counts.var
        and "gene_names" not in counts.uns
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", f"symbol,id\nTP53,{TP53}\n"),
        ("t.csv", f"{TP53}.5,TP53\n"),
        ("t.tsv", f"TP53\t{TP53}\n"),
        ("t.tsv", f"x\ty\nTP53\t{TP53}\n\t{CD74}\n"),
        ("t.tsv", f"chrom\tSymbol\tID\n17\tTP53\t{TP53}\n"),
        ("t.csv", f"a,b\n{TP53}.1,TP53\n{TP53}.2,TP53\n"),
    ],
)
def test_tables_of_any_header_and_order(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(content.encode()))
    for path in (tmp_path / name, packed):
        assert list(harmonise(counts_of([TP53, CD74]), path).var_names) == ["TP53", CD74]


def test_a_table_with_headers_id_and_symbol_may_map_other_ids(tmp_path):
    (tmp_path / "fly.csv").write_text("id,symbol\nFBgn0000490,dpp\n")
    found = harmonise(counts_of(["FBgn0000490", "wg"]), tmp_path / "fly.csv")
    assert list(found.var_names) == ["dpp", "wg"] and list(found.var["gene_ids"]) == ["FBgn0000490", ""]


def test_equal_symbols_of_different_ids_are_summed_exactly():
    values = [[1, 2, 3, 2**23], [0, 5, 7, 2**23 + 1]]
    found = harmonise(counts_of(["TBCE", "ACTB", "TBCE", "ACTB"], [TP53, ACTB, CD74, "ENSG00000000009"], values))
    assert list(found.var_names) == ["TBCE", "ACTB"]
    np.testing.assert_array_equal(found.X.toarray(), [[4, 2**23 + 2], [7, 2**23 + 6]])
    assert list(found.var["gene_ids"]) == [f"{TP53};{CD74}", f"{ACTB};ENSG00000000009"]
    assert found.uns["gene_names"]["summed"] == 2 and sp.issparse(found.X) and found.X.format == "csr"


def test_a_symbol_twice_that_nothing_tells_apart_stays_twice():
    for ids in (None, [TP53, TP53, CD74], ["A", "A", "B"]):
        found = harmonise(counts_of(["A", "A", "B"], ids))
        assert list(found.var_names) == ["A", "A", "B"], ids


def test_ids_of_10x_are_mapped_where_symbols_are_old(table):
    found = harmonise(counts_of(["P53", "CD74", "X"], [f"{TP53}.3", CD74, "ENSG00000000001"]), table)
    assert list(found.var_names) == ["TP53", "CD74", "X"]
    assert found.uns["gene_names"] == {"given": 3, "ids": 3, "matched": 2, "unmatched": 1, "summed": 0, "left_out": 0}


def test_pseudoautosomal_copies_and_genomes_of_10x_are_known():
    found = harmonise(counts_of([f"{TP53}.4", f"{TP53}.4_PAR_Y", f"GRCh38_{CD74}"]))
    assert list(found.var_names) == [TP53, CD74] and found.X.toarray().tolist() == [[3, 3], [9, 6]]


def test_two_species_are_refused_and_a_table_of_one_chooses_it(table, tmp_path, caplog):
    mixed = counts_of([TP53, MOUSE, CD74, "spike"])
    message = r"S1: gene ids of 2 species \(2 ENSG..., 1 ENSMUSG...\); counts of one of them, or a table"
    with pytest.raises(InputError, match=message):
        harmonise(mixed, where="S1")
    caplog.set_level(logging.INFO)
    found = harmonise(mixed, table)
    assert list(found.var_names) == ["TP53", "CD74", "spike"] and found.X.toarray().tolist() == [[1, 3, 4], [5, 7, 8]]
    assert found.uns["gene_names"]["left_out"] == 1 and "of another species: 1" in caplog.text
    (tmp_path / "both.csv").write_text(f"{TABLE}{MOUSE},Cd74\n")
    with pytest.raises(InputError, match="gene ids of 2 species"):
        harmonise(mixed, tmp_path / "both.csv")


def test_a_table_of_another_species_is_refused(table):
    with pytest.raises(InputError, match=f"none of 1 gene ids .first: {MOUSE}. is in .*genes.csv .first: {TP53}."):
        harmonise(counts_of([MOUSE, "x"]), table)
    harmonise(counts_of(["TP53", "x"]), table)  # no ids at all: nothing to match


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "a,b\nTP53,p53\n", r"two columns, one with Ensembl ids, .* it has 2 column\(s\): a, b"),
        ("t.csv", f"{TP53}\n", r"it has 1 column\(s\)"),
        ("t.csv", f"id,symbol\n{TP53},A\n{TP53}.2,B\n", f"1 ids have more than one symbol .first: {TP53}, A and B."),
        ("t.csv", "id,symbol\n", "gives no id a symbol"),
        ("t.csv", "", "cannot be read as a table"),
        ("t.xlsx", "PK", "gene table .*t.xlsx ends in .xlsx; .csv, .tsv, .csv.gz, .tsv.gz would fit"),
        ("t.csv", None, "gene table .*t.csv cannot be read"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        harmonise(counts_of([TP53]), tmp_path / name)
    assert "\n" not in str(caught.value)


NAMES = st.sampled_from([f"{TP53}.{v}" for v in range(3)] + [TP53, f"{CD74}.1", CD74, f"{ACTB}.9", "X", "Y", "x"])


@given(names=st.lists(NAMES, min_size=1, max_size=9, unique=True), with_table=st.booleans(), seed=st.integers(0, 99))
def test_every_count_arrives_under_its_new_name(tmp_path_factory, names, with_table, seed):
    values = np.random.default_rng(seed).integers(0, 9, (2, len(names)))
    symbols = {TP53: "TP53", CD74: "CD74"} if with_table else {}
    table = None
    if with_table:
        table = tmp_path_factory.mktemp("t") / "t.csv"
        table.write_text("id,symbol\n" + "".join(f"{k},{v}\n" for k, v in symbols.items()))
    ids = [name for name in names if name.startswith("ENS")]
    if with_table and ids and not any(name.split(".")[0] in symbols for name in ids):
        with pytest.raises(InputError, match="none of"):
            harmonise(counts_of(names, values=values), table)
        return
    expected: dict[str, np.ndarray] = {}
    for name, column in zip(names, values.T, strict=True):
        new = symbols.get(name.split(".")[0], name.split(".")[0])
        expected[new] = expected.get(new, 0) + column
    found = harmonise(counts_of(names, values=values), table)
    assert list(found.var_names) == list(expected)
    np.testing.assert_array_equal(found.X.toarray(), np.column_stack(list(expected.values())))
    assert found.uns["gene_names"]["summed"] == len(names) - len(expected)
