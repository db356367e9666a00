"""Domains, variable genes, gene sets and provenance, against slow versions, definitions and made-up structure."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from predicted import predicted

from stexp.data.readers.gene_sets import read_gene_sets
from stexp.errors import InputError
from stexp.evaluation.spatial import adjacency, morans_i, rows_to_one, variable_genes
from stexp.models import multimodal
from stexp.reporting import domain_comparison
from stexp.reporting.domain_comparison import compare_domains
from stexp.reporting.domains import agreement, majority, read_labels, spatial_domains
from stexp.reporting.gene_sets import gene_set_scores
from stexp.reporting.references import neighbour_table


def square(n: int, sections: int = 1, **layers: np.ndarray) -> ad.AnnData:
    """n x n spots in each section, row by row."""
    xy = np.stack(np.meshgrid(np.arange(n), np.arange(n)), axis=-1).reshape(-1, 2)
    xy = np.tile(xy * 100.0, (sections, 1))
    obs = pd.DataFrame({"section": np.repeat([f"S{i}" for i in range(sections)], n * n)})
    obs["spot"] = [f"{x:.0f}x{y:.0f}" for x, y in xy / 100]
    obs.index = obs["section"] + ":" + obs["spot"]
    adata = ad.AnnData(obs=obs, obsm={"spatial": xy})
    if layers:
        first = next(iter(layers.values()))
        adata = ad.AnnData(np.zeros(first.shape), obs=obs, obsm={"spatial": xy}, layers=layers)
        adata.var_names = [f"G{i}" for i in range(first.shape[1])]
    return adata


def test_spots_touch_their_neighbours_in_their_section():
    touching = adjacency(square(5, sections=2))
    assert (touching != touching.T).nnz == 0 and touching.diagonal().sum() == 0
    degree = np.asarray(touching.sum(axis=1)).reshape(2, 5, 5)
    assert (degree[:, 1:-1, 1:-1] == 4).all() and (degree[:, 0, 0] == 2).all() and degree.max() == 4
    assert touching[:25, 25:].nnz == 0
    hexagonal = adjacency(predicted())
    assert np.bincount(np.asarray(hexagonal.sum(axis=1), dtype=int).ravel()).argmax() == 6


def test_morans_i_is_its_definition(rng=np.random.default_rng(0)):  # noqa: B008
    values, weights = rng.normal(size=(12, 3)), rng.random((12, 12)) * (rng.random((12, 12)) < 0.4)
    np.fill_diagonal(weights, 0)
    moran, _ = morans_i(values, sp.csr_matrix(weights))
    for gene in range(3):
        z = values[:, gene] - values[:, gene].mean()
        total = sum(weights[i, j] * z[i] * z[j] for i in range(12) for j in range(12))
        assert moran[gene] == pytest.approx(12 / weights.sum() * total / (z**2).sum(), rel=1e-12)


def test_a_chessboard_has_minus_one_and_noise_a_standard_normal_z():
    weights = rows_to_one(adjacency(square(16)))
    board = (np.indices((16, 16)).sum(axis=0) % 2).reshape(-1, 1)
    assert morans_i(board, weights)[0] == pytest.approx(-1)
    moran, z = morans_i(np.random.default_rng(0).normal(size=(256, 2000)), weights)
    assert moran.mean() == pytest.approx(-1 / 255, abs=0.004)
    assert z.mean() == pytest.approx(0, abs=0.08) and z.std() == pytest.approx(1, abs=0.06)


def test_esda_finds_the_same():
    esda, libpysal = pytest.importorskip("esda"), pytest.importorskip("libpysal")
    adata = square(8)
    weights = rows_to_one(adjacency(adata))
    values = np.random.default_rng(0).normal(size=(64, 2)) + adata.obsm["spatial"] / 300
    moran, z = morans_i(values, weights)
    for gene in range(2):
        known = esda.Moran(values[:, gene], libpysal.weights.WSP(weights).to_W(), transformation="r", permutations=0)
        assert (moran[gene], z[gene]) == (pytest.approx(known.I, rel=1e-9), pytest.approx(known.z_norm, rel=1e-9))


def test_squidpy_finds_the_same():
    sq = pytest.importorskip("squidpy")
    adata = square(8, predicted=np.random.default_rng(0).normal(size=(64, 3)))
    sq.gr.spatial_neighbors(adata, coord_type="grid", n_neighs=4)
    known = sq.gr.spatial_autocorr(adata, mode="moran", layer="predicted", copy=True, n_jobs=1)
    table = variable_genes(adata).set_index("gene")
    np.testing.assert_allclose(table["predicted"], known.loc[table.index, "I"], rtol=1e-6)


def test_genes_with_a_pattern_come_first_and_constant_ones_have_no_value():
    rng = np.random.default_rng(0)
    pattern = square(12, sections=2).obsm["spatial"] / 1100
    noise = rng.normal(size=(288, 20)).astype(np.float32)
    noise[:, 3] = 5.0
    noise[:, [7, 11]] += 3 * pattern
    observed = noise.copy()
    observed[144:, 0] = np.nan  # not measured in the second section
    table = variable_genes(square(12, 2, predicted=noise, observed=observed))
    assert list(table["section"]) == ["S0"] * 20 + ["S1"] * 20
    for name, part in table.groupby("section"):
        part = part.set_index("gene")
        assert set(part.index[:2]) == {"G7", "G11"} and (part.loc[["G7", "G11"], "predicted_q"] < 1e-6).all()
        assert part.loc["G3", ["predicted", "predicted_q", "observed"]].isna().all() and part.index[-1] == "G3"
        assert (part["predicted_q"].iloc[2:-1] > 0.01).all()
        assert np.isnan(part.loc["G0", "observed"]) == (name == "S1")


def quadrants() -> ad.AnnData:
    """Embeddings that tell left from right, expression that tells the upper third from the rest."""
    rng = np.random.default_rng(0)
    adata = square(12)
    x, y = (adata.obsm["spatial"] // 100).T
    values = rng.normal(0, 0.3, (144, 8)) + 3 * (y < 4)[:, None]
    adata = square(12, predicted=values.astype(np.float32))
    adata.obsm["image_embedding"] = rng.normal(0, 0.3, (144, 5)) + 3 * (x < 5)[:, None]
    adata.obs["side"], adata.obs["level"] = np.where(x < 5, "left", "right"), np.where(y < 4, "up", "low")
    return adata


@pytest.mark.parametrize(
    ("by", "n", "truth"), [("image", 2, ["side"]), ("expression", 2, ["level"]), ("joint", 4, ["side", "level"])]
)
def test_domains_are_those_of_what_was_asked_for(by, n, truth):
    adata = quadrants()
    domains = spatial_domains(adata, by, n_domains=n, smooth=False)
    labels = adata.obs[truth].astype(str).agg(" ".join, axis=1)
    (score,) = agreement(domains, labels, adata.obs["section"].to_numpy(str)).to_dict("records")
    assert score["ari"] == score["nmi"] == 1.0 and score["n_spots"] == 144 and score["n_labels"] == n
    sizes = pd.Series(domains).value_counts(sort=False)
    assert list(sizes.index) == [str(i + 1) for i in range(n)] and sizes.is_monotonic_decreasing
    assert list(spatial_domains(adata, by, n_domains=n, smooth=False)) == list(domains)


def test_smoothing_makes_domains_hang_together():
    adata = quadrants()
    adata.obsm["image_embedding"] += np.random.default_rng(1).normal(0, 2.5, (144, 5))
    rough, smooth = (spatial_domains(adata, "image", n_domains=2, smooth=each) for each in (False, True))
    section = adata.obs["section"].to_numpy(str)
    scores = [agreement(domains, adata.obs["side"], section)["ari"].item() for domains in (rough, smooth)]
    assert scores[1] > scores[0] + 0.05
    i, j = adjacency(adata).nonzero()
    edges = [(np.asarray(domains)[i] != np.asarray(domains)[j]).sum() for domains in (rough, smooth)]
    assert edges[1] < edges[0]


def test_leiden_finds_the_groups():
    pytest.importorskip("igraph")
    adata = quadrants()
    domains = spatial_domains(adata, "joint", method="leiden", resolution=0.3)
    labels = adata.obs["side"] + adata.obs["level"]
    assert agreement(domains, labels, adata.obs["section"].to_numpy(str))["ari"].item() > 0.8
    assert list(spatial_domains(adata, "joint", method="leiden", resolution=0.3)) == list(domains)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"by": "pixels"}, "choose image, expression, joint"),
        ({"method": "ward"}, "choose kmeans, leiden, mixture"),
        ({"expression": "measured"}, "choose predicted or observed"),
        ({"expression": "observed"}, "nothing was measured"),
        ({"by": "multimodal", "n_domains": 0}, "a whole number from 1"),
        ({"n_domains": 500}, "a whole number from 1 to 144 would fit"),
        ({"method": "leiden", "resolution": -1}, "a number above 0 would fit"),
    ],
)
def test_domains_that_cannot_be_made_are_refused(arguments, says):
    with pytest.raises(InputError, match=says):
        spatial_domains(quadrants(), **arguments)


def test_domains_by_image_need_an_embedding():
    adata = quadrants()
    del adata.obsm["image_embedding"]
    with pytest.raises(InputError, match="take expression"):
        spatial_domains(adata, "joint")
    with pytest.raises(InputError, match="take expression"):
        spatial_domains(adata, "multimodal")


def test_a_spot_joins_the_majority_around_it_and_stays_where_there_is_none():
    around = sp.csr_matrix(np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 1, 1]]))
    assert list(majority(np.array([0, 1, 1, 0]), around)) == [1, 1, 0, 0]


@pytest.fixture(scope="module")
def compared() -> pd.DataFrame:
    adata = quadrants()
    adata.layers["observed"] = adata.layers["predicted"] + np.float32(0.1)
    adata.layers["observed"][:, 0] = np.nan  # not measured
    labels = adata.obs["side"] + adata.obs["level"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multimodal, "EPOCHS", 150)
        patch.setattr(domain_comparison, "SEEDS", range(2))
        return compare_domains(adata, labels, n_domains=4, resolution=0.3, smooth=True)


def test_domains_that_no_modality_tells_alone_are_those_of_both(compared, monkeypatch):
    monkeypatch.setattr(multimodal, "EPOCHS", 150)
    scores = compared.query("domains == 'multimodal'").set_index("expression")
    assert (scores["ari"] > 0.9).all() and (scores["nmi"] > 0.9).all() and (scores["over_seeds"] > 0.9).all()
    adata = quadrants()
    labels = adata.obs["side"] + adata.obs["level"]
    for by in ("image", "expression", "graph"):
        domains = spatial_domains(adata, by, method="mixture", n_domains=4)
        assert agreement(domains, labels, adata.obs["section"].to_numpy(str))["ari"].item() < 0.75


def test_each_way_has_its_own_scores(compared):
    ways = {("multimodal", "mixture"), ("joint", "kmeans")}
    assert ways <= set(zip(compared["domains"], compared["method"], strict=True))
    assert (compared.groupby(["domains", "method"]).size() == 2).all()  # by observed and by predicted expression
    observed = compared["expression"] == "observed"
    assert (
        compared.loc[observed, "with_observed"].isna().all() and (compared.loc[~observed, "with_observed"] > 0.8).all()
    )
    assert (compared["section"] == "S0").all() and (compared["n_spots"] == 144).all()


def test_agreement_leaves_out_spots_without_a_label():
    labels = pd.Series(["a", "a", None, "b", None, None], dtype=object)
    table = agreement(["1", "1", "2", "2", "1", "2"], labels, np.array(list("SSSSTT")))
    assert table.to_dict("records") == [{"section": "S", "n_spots": 3, "n_labels": 2, "ari": 1.0, "nmi": 1.0}]


def test_labels_come_from_obs_or_from_a_table(tmp_path):
    adata = square(2, sections=2)
    assert read_labels(adata, None) is None
    assert list(read_labels(adata, "spot")[:2]) == ["0x0", "1x0"]
    (tmp_path / "labels.csv").write_text("section,spot,label\nS1,1x0,tumour\nS0,1x0,fat\nS9,0x0,none\n")
    labels = read_labels(adata, str(tmp_path / "labels.csv"))
    assert labels.dropna().to_dict() == {"S0:1x0": "fat", "S1:1x0": "tumour"}
    (tmp_path / "short.tsv").write_text("spot\tlabel\n1x0\ttumour\n")
    assert read_labels(square(2), str(tmp_path / "short.tsv")).dropna().to_dict() == {"S0:1x0": "tumour"}
    with pytest.raises(InputError, match="lacks the column section"):
        read_labels(adata, str(tmp_path / "short.tsv"))
    with pytest.raises(InputError, match="no column of obs"):
        read_labels(adata, "pathology")


def test_gene_sets_are_read_from_every_form(tmp_path):
    expected = {"A": ["G1", "G2"], "B": ["NA"]}
    (tmp_path / "x.gmt").write_text("A\thttp://x\tG1\tG2\tG1\t\nB\t\tNA\n\n")
    (tmp_path / "x.yaml").write_text("A: [G1, G2]\nB: ['NA']\n")
    (tmp_path / "x.json").write_text(json.dumps(expected))
    (tmp_path / "x.csv").write_text("set,gene\nA,G1\nA,G2\nB,NA\n")
    for suffix in ("gmt", "yaml", "json", "csv"):
        assert read_gene_sets(tmp_path / f"x.{suffix}") == expected
    for text in ("A: 3", "[A, B]", "A: [", "A: []", ""):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InputError, match=r"gene sets .*bad.yaml") as caught:
            read_gene_sets(tmp_path / "bad.yaml")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="does not exist"):
        read_gene_sets(tmp_path / "none.gmt")


def test_a_gene_set_scores_high_where_its_genes_do():
    rng = np.random.default_rng(0)
    values = rng.gamma(2, 1, (144, 120)).astype(np.float32)
    left = square(12).obsm["spatial"][:, 0] < 500
    values[np.ix_(left, range(6))] += 2
    observed = values + rng.normal(0, 0.1, values.shape).astype(np.float32)
    observed[:, 5] = np.nan
    adata = square(12, predicted=values, observed=observed)
    scores, sets = gene_set_scores(adata, {"left": [*(f"G{i}" for i in range(6)), "absent"], "rest": ["G50", "G60"]})
    assert scores["left"][left].mean() > scores["left"][~left].mean() + 1.5
    assert abs(scores["rest"][left].mean() - scores["rest"][~left].mean()) < 0.5
    first, second = sets.to_dict("records")
    assert (first["n_genes"], first["n_predicted"], first["missing"]) == (7, 6, "absent")
    assert first["pearson"] > 0.95 and second["missing"] == ""
    scores, sets = gene_set_scores(adata, {"X": ["absent"], "Y": ["G1"]})
    assert list(scores) == ["Y"] and list(sets["n_predicted"]) == [0, 1] and np.isnan(sets["pearson"][0])
    with pytest.raises(InputError, match=r"none of the genes of 1 gene set\(s\) is predicted"):
        gene_set_scores(adata, {"X": ["absent"]})


def test_the_score_is_scanpys():
    sc = pytest.importorskip("scanpy")
    values = np.random.default_rng(0).gamma(2, 1, (64, 120)).astype(np.float32)
    adata = square(8, predicted=values)
    scores, _ = gene_set_scores(adata, {"set": ["G1", "G2", "G3"]})
    adata.X = values
    sc.tl.score_genes(adata, ["G1", "G2", "G3"], n_bins=2, ctrl_size=50, random_state=0)
    np.testing.assert_allclose(scores["set"], adata.obs["score"], rtol=1e-6)


def test_neighbours_are_named_with_their_weights():
    adata = predicted()
    table = neighbour_table(adata, [adata.obs_names[4], adata.obs_names[0]])
    assert list(table["spot"]) == [adata.obs_names[4]] * 3 + [adata.obs_names[0]] * 3
    assert list(table["rank"]) == [1, 2, 3] * 2
    np.testing.assert_allclose(table["weight"], [0.5, 0.3, 0.1] * 2, rtol=1e-6)
    names = list(adata.uns["references"].index)
    assert list(table["reference"]) == [names[row] for row in adata.obsm["neighbours"][[4, 0]].ravel()]
    assert (table["reference"] == table["reference_section"] + ":" + table["reference_spot"]).all()
    assert len(neighbour_table(adata)) == 3 * adata.n_obs
    with pytest.raises(InputError, match="nowhere not among"):
        neighbour_table(adata, "nowhere")
    del adata.obsm["neighbours"]
    with pytest.raises(InputError, match="does not retrieve"):
        neighbour_table(adata)
