"""What is no gene never enters the totals: left out by name, mapped back where one gene can be meant, or refused."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import scipy.sparse as sp

from stexp.data.genes import read_panel
from stexp.data.readers.excel_dates import date_of, gene_of
from stexp.data.readers.features import genes_of
from stexp.errors import InputError

HUMAN = ["ACTB", "CD74", "MALAT1"]


def counts_of(names, ids=None, types=None, genomes=None, n_spots=6):
    values = np.random.default_rng(0).poisson(3.0, (n_spots, len(names))) + 1
    spots = [f"s{i}" for i in range(n_spots)]
    matrix = sp.csr_matrix(values.astype(np.float32))
    return values, genes_of(matrix, spots, names, ids, types, genomes, "counts c.csv")


@pytest.mark.parametrize(
    "odd",
    [
        ["__no_feature", "__ambiguous[A+B]", "__not_aligned", "__too_low_aQual", "__alignment_not_unique"],
        ["N_unmapped", "N_multimapping", "N_noFeature", "N_ambiguous"],
        ["Unassigned_NoFeatures", "Unassigned_Ambiguity", "no_feature", "*", "unmapped"],
        ["total_counts", "n_genes_by_counts", "pct_counts_mt", "log1p_total_counts", "total_counts_mt"],
        ["nCount_RNA", "nFeature_Spatial", "percent.mt", "orig.ident", "seurat_clusters", "Unnamed: 0"],
        ["in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "x", "y", "leiden", "total"],
        ["NegControlProbe_00042", "BLANK_0006", "UnassignedCodeword_0001", "ERCC-00002", "NegPrb3"],
        ["CD3_TotalSeqB", "ADT_CD19", "HTO_1", "Hashtag1"],
    ],
)
def test_what_is_no_gene_is_left_out_and_named(caplog, odd):
    caplog.set_level(logging.INFO)
    values, counts = counts_of([*odd, *HUMAN])
    assert list(counts.var_names) == HUMAN
    np.testing.assert_array_equal(counts.X.toarray(), values[:, len(odd) :])
    assert "no genes and left out" in caplog.text and odd[0] in caplog.text


@pytest.mark.parametrize(
    "gene",
    ["y", "N", "sum1", "DEC1", "dec-1", "sep-1", "jun-1", "SEPT2", "MARCH1", "HLA-A", "NKX2-1", "ERCC1", "SUMO1",
     "TOTAL1", "nan", "NA", "BATF", "7SK", "FO538757.1", "MT-CO1", "mt-Co1", "RN7SL1", "CLUSTERIN", "T", "H2-K1",
     "2310009E13Rik", "AB_123", "NM_000546", "X__y", "TP53_1", "CE1_2"],
)  # fmt: skip
def test_names_that_only_look_odd_stay(caplog, gene):
    _, counts = counts_of([gene, *HUMAN])
    assert list(counts.var_names) == [gene, *HUMAN] and not caplog.text


def test_an_ensembl_id_behind_a_name_is_a_gene():
    _, counts = counts_of(["total", "ACTB"], ["ENSG00000000001", "ENSG00000000002"])
    assert list(counts.var_names) == ["total", "ACTB"]


def test_a_column_that_is_the_sum_of_all_others_is_refused():
    values = np.random.default_rng(0).poisson(3.0, (6, 5)).astype(np.float32)
    values[:, 2] = values.sum(1) - values[:, 2]
    with pytest.raises(InputError, match=r"counts c.csv: everything is the sum of all other genes in every spot"):
        genes_of(sp.csr_matrix(values), list("abcdef"), ["A", "B", "everything", "C", "D"], where="counts c.csv")
    values[0, 2] += 1
    assert genes_of(sp.csr_matrix(values), list("abcdef"), ["A", "B", "X", "C", "D"]).n_vars == 5


@pytest.mark.parametrize(
    ("date", "gene"),
    [
        ("2-Sep", "SEPTIN2"), ("02-Sep", "SEPTIN2"), ("Sep-02", "SEPTIN2"), ("9-Sep-22", "SEPTIN9"),
        ("2. Sep", "SEPTIN2"), ("2022-09-11", "SEPTIN11"), ("2022-09-02 00:00:00", "SEPTIN2"), ("7-sept.", "SEPTIN7"),
        ("3-Mar", "MARCHF3"), ("7-Mrz", "MARCHF7"), ("11-mars", "MARCHF11"),
    ],
)  # fmt: skip
def test_dates_that_only_one_gene_became_are_that_gene(caplog, date, gene):
    _, counts = counts_of([date, *HUMAN])
    assert list(counts.var_names) == [gene, *HUMAN] and f"{date} -> {gene}" in caplog.text
    assert gene_of(date, ["Actb", "Cd74", "Malat1"]) == gene.capitalize()  # as mice spell it


@pytest.mark.parametrize(
    "name",
    ["1-Mar", "2-Mar", "Mar-01", "1-Dec", "15-Sep", "4-Oct", "1-Apr", "2/9/2022", "02.09.2022", "2-Sep.1", "44621",
     "1.5", "2.31E+19"],
)  # fmt: skip
def test_names_that_may_have_been_several_genes_are_refused_unless_an_id_stands_behind(name):
    with pytest.raises(InputError, match=r"are dates or numbers .* that a spreadsheet made of genes") as caught:
        counts_of([name, *HUMAN])
    assert name in str(caught.value) and "\n" not in str(caught.value)
    ids = [f"ENSG{i:011d}" for i in range(4)]
    assert list(counts_of([name, *HUMAN], ids)[1].var_names) == [ids[0], *HUMAN]


def test_a_date_is_not_mapped_onto_a_gene_that_is_there():
    with pytest.raises(InputError, match="1 names are dates"):
        counts_of(["2-Sep", "SEPTIN2", *HUMAN])


def test_ids_of_entrez_are_names():
    assert list(counts_of(["7157", "972", "60", "ACTB"])[1].var_names) == ["7157", "972", "60", "ACTB"]


@pytest.mark.parametrize("name", ["SEPT2", "MARCH1", "sep-1", "HLA-2", "DEC1", "KRT5", "13-Foo", "2022-9"])
def test_names_that_are_no_dates(name):
    assert date_of(name) is None


@pytest.mark.parametrize("prefix", ["GRCh38_", "mm10___", "hg19_", "GRCm39____", "GRCh38-2020-A_"])
def test_the_genome_before_every_name_goes(caplog, prefix):
    caplog.set_level(logging.INFO)
    _, counts = counts_of([f"{prefix}{gene}" for gene in HUMAN])
    assert list(counts.var_names) == HUMAN and "lose the genome before them" in caplog.text


def test_a_genome_that_the_file_names_goes():
    _, counts = counts_of(["mine_ACTB", "mine_CD74"], ["a", "b"], genomes=["mine", "mine"])
    assert list(counts.var_names) == ["ACTB", "CD74"]


def test_names_of_two_genomes_are_refused():
    with pytest.raises(InputError, match=r"genes of 2 genomes .2 human, 1 mouse; such as GRCh38_ACTB, mm10___Actb"):
        counts_of(["GRCh38_ACTB", "mm10___Actb", "GRCh38_CD74", "X"])
    # one species by two names of its genome
    assert list(counts_of(["GRCh38_ACTB", "hg19_CD74"])[1].var_names) == ["ACTB", "CD74"]


def test_types_that_10x_does_not_write_are_said(caplog):
    caplog.set_level(logging.INFO)
    _, counts = counts_of(HUMAN, types=["protein_coding", "lncRNA", ""])
    assert list(counts.var_names) == HUMAN and "no types of features that 10x writes" in caplog.text


def test_a_feature_without_a_name_has_no_counts():
    values = sp.csr_matrix(np.array([[1, 0], [2, 0]], np.float32))
    assert list(genes_of(values, ["a", "b"], ["ACTB", ""]).var_names) == ["ACTB"]
    with pytest.raises(InputError, match="1 features have counts and no name"):
        genes_of(values[:, ::-1], ["a", "b"], ["ACTB", ""])


def test_nothing_but_summaries_is_no_matrix():
    with pytest.raises(InputError, match=r"none of 2 features is a gene .first: __no_feature"):
        counts_of(["__no_feature", "__ambiguous"])


SPOT_COLUMNS = """Total counts|Total UMI|UMIs|UMI|total_umi_count|n_features|nFeatures|detected_genes|gene_count
num_genes|num_counts|library.size|lib.size|sizeFactor|pct_mt|mt_frac|x_coord
row|col|label|annotation|cluster_id
Patient_ID|in tissue|reads|nuclei|V1|X.1|level_0|nUMI|Sample.Name|CellType|RNA_snn_res.0.8|UMAP_1|percent.largest.gene
new_x|n_cells
pct_counts_hb|array-row|Spot ID|SizeFactors|num_reads|TOTAL_READS|predicted_labels|orig.ident"""


@pytest.mark.parametrize("name", SPOT_COLUMNS.replace("\n", "|").split("|"))
def test_a_column_about_spots_is_known_by_its_words(caplog, name):
    values, counts = counts_of([name, *HUMAN])
    assert list(counts.var_names) == HUMAN and f"left out: {name}" in caplog.text
    assert counts.X.sum() == values[:, 1:].sum()


GENES = """MT1X CD8A AREG TOTAL1 IDS Ids SNN Snn ID1 Id2 PC SCORE1 NUMB
LIBX CELSR1 T N y MT-ND1 mt-Co1 n-R5s211 HLA-DRA
SUM1 X1 RN7SK SUMO2 CLU SPOCK1 LABX Row1 COL1A1 ROWAN COUNTIN NAME MT FRA10AC1 REGIONX PCT1 SAMD9 LAYN ANNX
TOTALIN H2-Aa
5-HT1A 14-3-3zeta RP11-206L10.9 hsa_circ_0001 Human1 rat1 mm9a MARK3 MARCKS Sepp1 JUNB MAYA DECR1 NOV OCT4 APRIL
AUG1 sep-1 mar-2 MARK-3 Junb-1 GRCh TRUEX FALSE1"""


@pytest.mark.parametrize("name", GENES.split())
def test_a_gene_is_no_column_about_spots_no_date_and_no_genome(caplog, name):
    assert list(counts_of([name, *HUMAN])[1].var_names) == [name, *HUMAN] and not caplog.text


def measured(column, n_spots=40):
    """Counts of ten genes with the column amid them."""
    rng = np.random.default_rng(3)
    values = rng.poisson(rng.uniform(2, 9, (n_spots, 1)) * rng.uniform(1, 3, (1, 10))).astype(np.float32)
    values = np.insert(values, 4, column(values), axis=1)
    names = [*"ABCD", "odd", *"EFGHIJ"]
    return genes_of(sp.csr_matrix(values), [f"s{i}" for i in range(n_spots)], names, where="counts c.csv")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (lambda values: values.sum(1), "odd is the sum of all other genes"),
        (lambda values: values.sum(1) // 2 + np.arange(40) % 3, "odd follows the sum of all other genes"),
        (lambda values: values.sum(1) * 3 + 2, "odd follows the sum of all other genes"),
        (lambda values: values.sum(1) / 100, "odd hold fractions amid counts"),
        (lambda values: np.arange(40), "odd numbers the spots .0, 1"),
    ],
)
def test_a_column_that_was_computed_is_refused_by_its_values(column, message):
    with pytest.raises(InputError, match=message):
        measured(column)


@pytest.mark.parametrize("share", [0.02, 0.3, 2.0])
def test_a_gene_that_is_a_share_of_the_total_scatters_and_stays(share):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert measured(lambda values, rng=rng: rng.poisson(share * values.sum(1))).n_vars == 11


@pytest.mark.parametrize(
    ("name", "gene"),
    [
        ("2-wrz", "SEPTIN2"), ("02.сен", "SEPTIN2"), ("2-Eyl", "SEPTIN2"), ("2-zář", "SEPTIN2"), ("9月2日", "SEPTIN2"),
        ("2006年9月2日", "SEPTIN2"), ("9월 2일", "SEPTIN2"), ("2-September", "SEPTIN2"), ("September 2", "SEPTIN2"),
        ("Sept. 2, 2006", "SEPTIN2"), ("2 septembre", "SEPTIN2"), ("2 de septiembre de 2006", "SEPTIN2"),
        ("2006-09-02 00:00", "SEPTIN2"), ("2006/09/02", "SEPTIN2"), ("2006-09-02T00:00:00Z", "SEPTIN2"),
        ("2nd Sep", "SEPTIN2"), ("X2.Sep", "SEPTIN2"), ("2. září", "SEPTIN2"), ("7.syys", "SEPTIN7"),
        ("11-set", "SEPTIN11"), ("4-Σεπ", "SEPTIN4"), ("5-ruj", "SEPTIN5"), ("6-szept.", "SEPTIN6"),
        ("3-бер", "MARCHF3"), ("4-мар", "MARCHF4"), ("5 marzec", "MARCHF5"), ("6-bře", "MARCHF6"),
        ("8-març", "MARCHF8"),
    ],
)  # fmt: skip
def test_dates_of_other_languages_are_that_gene(name, gene):
    assert list(counts_of([name, *HUMAN])[1].var_names) == [gene, *HUMAN]


@pytest.mark.parametrize(
    "name",
    ["1-gru", "1-lis", "1-мар", "2-březen", "9/2", "09-02", "9.2.06", "2,31E+19", "#REF!", "#NAME?", "#N/A", "#####",
     "TRUE", "FALSE", "WAHR", "1-Aralık", "9/2/2006 0:00", "20060902", "15 septembre"],
)  # fmt: skip
def test_what_a_spreadsheet_left_of_a_gene_is_refused(name):
    with pytest.raises(InputError, match=r"1 names are dates or numbers \(or errors\)"):
        counts_of([name, *HUMAN])


@pytest.mark.parametrize("prefix", ["human_", "mouse_", "GRCh38-", "hg38:", "mm10.", "Homo_sapiens_", "Rat-", "Human:"])
def test_the_species_before_every_name_goes_and_before_some_is_refused(prefix):
    assert list(counts_of([f"{prefix}{gene}" for gene in ("HLA-A", *HUMAN)])[1].var_names) == ["HLA-A", *HUMAN]
    with pytest.raises(InputError, match="1 of 4 names have a genome or species before them"):
        counts_of([f"{prefix}XIST", *HUMAN])


def test_two_species_by_their_words_are_refused():
    with pytest.raises(InputError, match=r"genes of 2 genomes .2 human, 2 mouse"):
        counts_of(["human_ACTB", "human_CD74", "mouse_Actb", "mouse-Cd74"])


# panels


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfERBB2\nCD74\nCOL1A1\n",
        "\ufeffERBB2\r\nCD74\r\nCOL1A1\r\n".encode("utf-16-le"),
        b'"ERBB2"\n"CD74"\n"COL1A1"\n',
        b"ERBB2,CD74,COL1A1",
        b"ERBB2;CD74;COL1A1\n",
        b"ERBB2\rCD74\rCOL1A1\r",
    ],
)
def test_panels_as_people_write_them(tmp_path, content):
    (tmp_path / "panel.txt").write_bytes(content)
    assert read_panel(tmp_path / "panel.txt") == ["ERBB2", "CD74", "COL1A1"]


@pytest.mark.parametrize(
    ("content", "message"), [(b"ERBB2\n2-Sep\n", "dates .*: 2-Sep"), (b"ERBB2\x00\x01\n", "is no text|are not text")]
)
def test_panels_that_name_no_genes(tmp_path, content, message):
    (tmp_path / "panel.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_panel(tmp_path / "panel.txt")


def test_genomes_that_only_a_column_names_are_two_all_the_same():
    with pytest.raises(InputError, match=r"genes of 2 genomes .2 human, 1 mouse"):
        counts_of(HUMAN, genomes=["GRCh38", "GRCh38", "mm10"])
    # a virus beside its host has no species of its own
    assert list(counts_of(HUMAN, genomes=["GRCh38", "GRCh38", "SARS-CoV-2"])[1].var_names) == HUMAN
