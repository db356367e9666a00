"""A matrix means the same in every kind of file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import anndata as ad
import containers
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from containers import ANTIBODY, GENE, HASH, Matrix
from fakes import hest
from fakes.spatialdata import annotate, visium_table, write_visium
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stexp.data.gene_names import harmonise
from stexp.data.readers.formats import read_counts
from stexp.data.readers.h5ad import counts_of
from stexp.data.readers.hest import read_hest
from stexp.data.readers.spatialdata import read_spatialdata
from stexp.errors import InputError

SYMBOLS = ["TP53", "CD74", "ACTB", "PTPRC", "KRT5", "MALAT1", "EPCAM"]
SPECIES = {"human": ("ENSG", "GRCh38"), "mouse": ("ENSMUSG", "mm10")}


@st.composite
def matrices(draw) -> Matrix:
    """Genes of one species or two, with versions, prefixes or without, and captured proteins of the same names."""
    symbols = draw(st.lists(st.sampled_from(SYMBOLS), min_size=1, max_size=7, unique=True))
    proteins = draw(st.lists(st.sampled_from(SYMBOLS), max_size=3, unique=True))
    several = draw(st.booleans()) and draw(st.booleans())
    prefixed = several or draw(st.booleans())
    version = draw(st.sampled_from(["", ".7"]))
    species = [draw(st.sampled_from(list(SPECIES))) if several else "human" for _ in symbols]
    ids, names, genomes = [], [], []
    for symbol, kind in zip(symbols, species, strict=True):
        ens, genome = SPECIES[kind]
        before = f"{genome}_" if prefixed else ""
        ids.append(f"{before}{ens}{SYMBOLS.index(symbol):011d}{version}")
        names.append(f"{before}{symbol}")
        genomes.append(genome)
    types = [GENE] * len(symbols) + draw(
        st.lists(st.sampled_from([ANTIBODY, HASH]), min_size=len(proteins), max_size=len(proteins))
    )
    n_spots = draw(st.integers(1, 6))
    values = np.random.default_rng(draw(st.integers(0, 99))).poisson(2.0, (n_spots, len(types)))
    spots = [f"{'ACGT' * 3}{letters}-1" for letters in ("AA", "AC", "AG", "AT", "CA", "CC")[:n_spots]]
    return Matrix(values, spots, ids + proteins, names + proteins, types, [*genomes, *[""] * len(proteins)])


def read(path: Path, spots: list[str], table: Path | None) -> ad.AnnData | None:
    """Counts with harmonised names, or None where they are refused."""
    try:
        return harmonise(read_counts(path, pd.Index(spots)), table)
    except InputError as error:
        assert "\n" not in str(error)
        return None


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(matrix=matrices(), with_table=st.booleans())
def test_a_matrix_is_the_same_in_every_container(matrix, with_table):
    genes = [i for i, kind in enumerate(matrix.types) if kind == GENE]
    human = [i for i in genes if "ENSG" in matrix.ids[i]]
    symbols = {i: matrix.names[i].removeprefix("GRCh38_").removeprefix("mm10_") for i in genes}
    with TemporaryDirectory() as folder:
        root = Path(folder)
        containers.write_h5(root / "c.h5", matrix)
        containers.write_mtx(root / "mtx", matrix)
        containers.write_h5ad(root / "c.h5ad", matrix)
        containers.write_h5ad_by_id(root / "by_id.h5ad", matrix)
        containers.write_table(root / "c.csv", matrix)
        containers.write_table(root / "c.tsv", matrix, turned=True)
        containers.write_table(root / "ids.csv", matrix, by="ids")
        table = None
        if with_table:
            table = root / "genes.csv"
            lines = [f"ENSG{i:011d},{symbol}\n" for i, symbol in enumerate(SYMBOLS)]
            table.write_text("id,symbol\n" + "".join(lines))
        by_id = {name: read(root / name, matrix.spots, table) for name in ("c.h5", "mtx", "c.h5ad", "by_id.h5ad")}
        by_name = [read(root / name, matrix.spots, None) for name in ("c.csv", "c.tsv")]
        ids = read(root / "ids.csv", matrix.spots, table)
    is_mixed = 0 < len(human) < len(genes)
    kept = human if with_table else genes
    for name, counts in by_id.items():
        if (is_mixed and not with_table) or not kept:  # a table chooses the species; without one two are refused
            assert counts is None, name
            continue
        assert list(counts.var_names) == [symbols[i] for i in kept], name
        assert list(counts.var["gene_ids"]) == [matrix.ids[i].split("_")[-1].split(".")[0] for i in kept], name
        np.testing.assert_array_equal(counts.X.toarray(), matrix.values[:, kept])
        assert list(counts.obs_names) == matrix.spots
    for counts in by_name:
        if is_mixed:
            assert counts is None
            continue
        assert list(counts.var_names) == [symbols[i] for i in genes]
        np.testing.assert_array_equal(counts.X.toarray(), matrix.values[:, genes])
    if with_table and kept:
        assert list(ids.var_names) == [symbols[i] for i in kept]
        np.testing.assert_array_equal(ids.X.toarray(), matrix.values[:, kept])


def test_an_anndata_in_memory_is_read_like_its_file_and_left_alone():
    """Tables of SpatialData are AnnData."""
    matrix = Matrix(
        np.array([[1, 2, 100], [3, 4, 200]]),
        ["a", "b"],
        ["ENSG00000000001", "ENSG00000000002", "CD74"],
        ["TP53", "CD74", "CD74"],
        [GENE, GENE, ANTIBODY],
        ["GRCh38", "GRCh38", ""],
    )
    table = ad.AnnData(matrix.values, obs=pd.DataFrame(index=matrix.spots), var=containers.var_of(matrix))
    table.uns["spatialdata_attrs"] = {"region": "spots", "region_key": "region", "instance_key": "id"}
    before = table.copy()
    counts = counts_of(table, "table")
    assert list(counts.var_names) == ["TP53", "CD74"] and counts.X.toarray().tolist() == [[1, 2], [3, 4]]
    pd.testing.assert_frame_equal(table.var, before.var)
    assert (table.X == before.X).all()


@pytest.mark.parametrize("write", [containers.write_h5, containers.write_mtx, containers.write_h5ad])
def test_a_matrix_without_genes_is_refused(tmp_path, write):
    matrix = Matrix(np.ones((2, 2), int), ["a", "b"], ["x", "y"], ["CD3", "CD8"], [ANTIBODY, HASH], ["", ""])
    path = tmp_path / ("c.h5ad" if write is containers.write_h5ad else "c.h5")
    write(path, matrix)
    with pytest.raises(InputError, match="no feature of type Gene Expression, only Antibody Capture, Multiplexing"):
        read_counts(path)


def test_kinds_of_genes_are_no_types_of_features(tmp_path):
    """CELLxGENE's column feature_type says protein_coding."""
    matrix = Matrix(
        np.ones((2, 2), int), ["a", "b"], ["x", "y"], ["TP53", "XIST"], ["protein_coding", "lncRNA"], [""] * 2
    )
    containers.write_h5ad(tmp_path / "c.h5ad", matrix)
    assert list(read_counts(tmp_path / "c.h5ad").var_names) == ["TP53", "XIST"]


@pytest.mark.slow
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(matrix=matrices(), seed=st.integers(0, 9))
def test_sections_of_hest_and_spatialdata_hold_the_matrix_of_their_file(matrix, seed):
    pytest.importorskip("spatialdata")
    genes = [i for i, kind in enumerate(matrix.types) if kind == GENE]
    with TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "hest").mkdir()
        spots = hest.write_section(root / "hest", "A", seed)
        values = np.random.default_rng(seed).poisson(2.0, (spots.n_obs, len(matrix.types))) + 1
        counts = sp.csr_matrix(values.astype(np.float32))
        names, var = list(spots.obs_names), containers.var_of(matrix)
        ad.AnnData(counts, obs=spots.obs, var=var, obsm=spots.obsm, uns=spots.uns).write_h5ad(root / "hest/st/A.h5ad")
        metadata = {"id": ["A"], "species": ["Homo sapiens"], "patient": ["P"], "st_technology": ["Visium"]}
        about = {"dataset_title": "t", "organ": "Skin", "image_filename": "A.tif", "pixel_size_um_estimated": 0.5}
        pd.DataFrame(metadata).assign(**about, hest_version_added="v1_0_0").to_csv(root / "hest/HEST_v1_1_0.csv")
        table = visium_table(seed)
        assert list(table.obs_names) == names
        changed = ad.AnnData(counts, obs=table.obs, var=var, obsm=table.obsm)
        write_visium(root / "A.zarr", seed, tables={"table": annotate(changed, "A", "spot_id")})
        containers.write_h5ad(root / "c.h5ad", replace(matrix, values=values, spots=names))
        expected = read(root / "c.h5ad", names, None)
        for reader, place in ((read_hest, root / "hest"), (read_spatialdata, root / "A.zarr")):
            try:
                (section,) = reader(place)
            except InputError as error:
                assert expected is None and "\n" not in str(error)
                continue
            assert list(section.genes) == list(expected.var_names), reader
            np.testing.assert_array_equal(section.spots.X.toarray(), values[:, genes])
            np.testing.assert_array_equal(section.spots.X.toarray(), expected.X.toarray())
