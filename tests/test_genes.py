from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from sections import make_section

from stexp.data.genes import choose_panel, expression, normalise, read_panel
from stexp.data.section import Section
from stexp.errors import InputError
from stexp.protocol import Protocol

STRICT = Protocol("strict")
PAPER = Protocol("paper", library="panel", log="log10", truth="gene")


def slow_normalise(counts, total_counts, protocol, scaling) -> np.ndarray:
    out = np.full(counts.shape, np.nan)
    for i in range(counts.shape[0]):
        for g in range(counts.shape[1]):
            if math.isnan(counts[i, g]):
                continue
            if scaling == "gene":
                total = sum(counts[:, g])
            elif protocol.library == "panel":
                total = sum(value for value in counts[i] if not math.isnan(value))
            else:
                total = total_counts[i]
            scaled = protocol.target_sum * counts[i, g] / total if total > 0 else 0.0
            out[i, g] = math.log(1 + scaled) if protocol.log == "natural" else math.log10(1 + scaled)
    return out


# normalise


@given(seed=st.integers(0, 10**6), n=st.integers(2, 30))
def test_residuals_equal_those_of_scanpy(seed, n):
    rng = np.random.default_rng(seed)
    whole = rng.negative_binomial(1, 0.3, (n, 12)) * (rng.random(12) < 0.8)
    whole[:, 0] += 1  # no spot and not all genes are empty
    whole[0, 1] += 500  # beyond the clip
    expected = sc.experimental.pp.normalize_pearson_residuals(ad.AnnData(whole.astype(np.float64)), inplace=False)["X"]
    panel = whole[:, 1:6].astype(np.float64)
    got = normalise(panel, whole.sum(axis=1), Protocol("x", truth="residuals"))
    np.testing.assert_allclose(got, np.nan_to_num(expected[:, 1:6]), rtol=1e-4, atol=1e-5)
    panel[:, 0] += 1
    expected = sc.experimental.pp.normalize_pearson_residuals(ad.AnnData(panel), inplace=False)["X"]
    got = normalise(panel, whole.sum(axis=1), Protocol("x", truth="residuals", library="panel"))
    np.testing.assert_allclose(got, np.nan_to_num(expected), rtol=1e-4, atol=1e-5)


def test_residuals_of_counts_that_follow_depth_alone_do_not_follow_it():
    rng = np.random.default_rng(0)
    depth = rng.lognormal(6, 1, 2000)
    counts = rng.poisson(depth[:, None] * [0.001, 0.01, 0.05])
    residuals = normalise(counts, depth, Protocol("x", truth="residuals"))
    assert np.abs(np.corrcoef(residuals.T, np.log(depth))[-1, :-1]).max() < 0.08
    np.testing.assert_allclose(residuals.mean(axis=0), 0, atol=0.05)
    assert np.corrcoef(normalise(counts, depth, STRICT)[:, 0], np.log(depth))[0, 1] > 0.2  # ln(1 + x) does


def test_residuals_and_blocks_are_refused_together():
    with pytest.raises(InputError, match=r"truth=residuals.*hold_out=block"):
        Protocol("x", hold_out="block", truth="residuals")


@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    seed=st.integers(0, 10**6),
    protocol=st.builds(
        Protocol,
        st.just("x"),
        target_sum=st.sampled_from([1e4, 1e6, 1.0]),
        library=st.sampled_from(["transcriptome", "panel"]),
        log=st.sampled_from(["natural", "log10"]),
        truth=st.sampled_from(["spot", "gene"]),
    ),
    scaling=st.sampled_from([None, "spot", "gene"]),
)
def test_normalise_equals_the_formula(shape, seed, protocol, scaling):
    rng, (n, g) = np.random.default_rng(seed), shape
    counts = rng.poisson(1.0, (n, g)).astype(np.float32)  # sparse enough for empty rows and columns
    total = counts.sum(1) + rng.poisson(0.5, n)
    counts[:, rng.random(g) < 0.2] = np.nan
    got = normalise(counts, total, protocol, scaling)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, slow_normalise(counts, total, protocol, scaling or protocol.truth), rtol=1e-5)


def test_a_normalised_spot_adds_up_to_the_target_over_its_library():
    counts = np.array([[1.0, 2, 7], [0, 0, 0], [3, 0, 0]])
    by_panel = np.expm1(normalise(counts, counts.sum(1), replace(STRICT, library="panel")))
    np.testing.assert_allclose(by_panel.sum(1), [1e4, 0, 1e4], rtol=1e-5)
    by_transcriptome = np.expm1(normalise(counts, np.array([100.0, 50, 3]), STRICT))
    np.testing.assert_allclose(by_transcriptome.sum(1), [1e3, 0, 1e4], rtol=1e-5)


def test_gene_scaling_keeps_depth_and_spot_scaling_removes_it():
    composition = np.array([[4.0, 3, 2], [2, 5, 3]])
    counts = composition * [[1], [10]]
    paper = np.power(10, normalise(counts, counts.sum(1), PAPER).astype(float)) - 1
    np.testing.assert_allclose(paper.sum(0), 1e4, rtol=1e-4)
    np.testing.assert_allclose(paper[1] / paper[0], counts[1] / counts[0], rtol=1e-4)
    deeper = normalise(counts * [[1], [7]], counts.sum(1) * [1, 7], STRICT)
    np.testing.assert_allclose(deeper, normalise(counts, counts.sum(1), STRICT), rtol=1e-6)


def test_a_gene_not_measured_does_not_touch_the_others():
    counts = np.array([[1.0, np.nan, 3], [2, np.nan, 0]])
    for protocol in (STRICT, PAPER, replace(STRICT, library="panel")):
        got = normalise(counts, np.array([9.0, 5]), protocol)
        assert np.isnan(got[:, 1]).all()
        np.testing.assert_array_equal(got[:, [0, 2]], normalise(counts[:, [0, 2]], np.array([9.0, 5]), protocol))


def test_normalise_leaves_its_input_alone():
    counts, total = np.array([[1.0, 2], [0, 0]]), np.array([3.0, 0])
    normalise(counts, total, STRICT)
    np.testing.assert_array_equal(counts, [[1, 2], [0, 0]])
    np.testing.assert_array_equal(total, [3, 0])


@pytest.mark.parametrize(
    "misspelt",
    [
        {"log": "log2"},
        {"truth": "genes"},
        {"library": "pannel"},
        {"panel": "test"},
        {"hold_out": "donor"},
        {"heg": "all"},
        {"spot_context": "spot"},
        {"k": "best"},
    ],
)
def test_a_misspelt_switch_is_refused_and_not_read_as_something_else(misspelt):
    ((key, value),) = misspelt.items()
    with pytest.raises(InputError, match=f"protocol.{key}={value}"):
        Protocol("x", **misspelt)


# panels


@pytest.fixture
def three(tmp_path) -> list[Section]:
    return [make_section(tmp_path, f"{p}1", p, 40, 60, image=False, seed=i) for i, p in enumerate("ABC")]


def test_the_panel_does_not_depend_on_the_order_of_sections_or_genes(three):
    protocol = Protocol("x", n_hvg=20, panel_size=12)
    panel = choose_panel(three, protocol)
    assert len(panel) == 12 and panel == sorted(panel)
    for order in permutations(three):
        assert choose_panel(list(order), protocol) == panel
    shuffled = [
        Section(s.name, s.patient, s.spots[:, np.random.default_rng(i).permutation(60)].copy())
        for i, s in enumerate(three)
    ]
    assert choose_panel(shuffled, protocol) == panel


def with_counts(section: Section, change) -> Section:
    spots = section.spots.copy()
    dense = spots.X.toarray()
    change(dense)
    spots.X = sp.csr_matrix(dense)
    return Section(section.name, section.patient, spots, section.slide)


def planted(section: Section, *variable: int) -> Section:
    """Genes at three levels, 20 each, all steady but the `variable` ones, which are on and off at the same mean."""

    def plant(dense):
        dense[:] = np.random.default_rng(0).poisson(np.repeat([20.0, 60, 200], 20), dense.shape)
        for gene in variable:
            dense[::2, gene], dense[1::2, gene] = 2 * dense[::2, gene], 0

    return with_counts(section, plant)


def test_variable_genes_are_chosen_and_steady_ones_not(three):
    sections = [planted(section, 3, 24, 45) for section in three]
    assert choose_panel(sections, Protocol("x", n_hvg=3)) == ["g03", "g24", "g45"]


def test_a_gene_variable_in_more_sections_goes_first(three):
    sections = [planted(section, 3, 24 + i) for i, section in enumerate(three)]
    protocol = Protocol("x", n_hvg=2, panel_size=None)
    assert choose_panel(sections, protocol) == ["g03", "g24", "g25", "g26"]
    assert choose_panel(sections, replace(protocol, panel_size=1)) == ["g03"]


def test_rare_genes_are_left_out_at_the_stated_fraction(three):
    def rare(dense):
        dense[dense == 0] = 1
        dense[:, 0] = 0

    def seen_by_four(dense):
        rare(dense)
        dense[:4, 0] = 90

    sections = [with_counts(three[0], seen_by_four), with_counts(three[1], rare), with_counts(three[2], seen_by_four)]
    every = Protocol("x", n_hvg=60, panel_size=None)  # 8 of 120 spots
    assert "g00" in choose_panel(sections, replace(every, min_spots=8 / 120))
    assert "g00" not in choose_panel(sections, replace(every, min_spots=8.01 / 120))


def test_a_stored_zero_is_no_count(three):
    def clear(dense):
        dense[dense == 0] = 1
        dense[:, 0] = 0
        dense[:2, 0] = 50

    sections = [with_counts(section, clear) for section in three]
    protocol = Protocol("x", n_hvg=60, min_spots=0.075)
    assert "g00" not in choose_panel(sections, protocol)
    padded = []
    for section in sections:
        n, g = section.spots.shape
        dense = section.spots.X.toarray()
        stored = sp.csr_matrix((dense.ravel(), np.tile(np.arange(g), n), np.arange(n + 1) * g), dense.shape)
        spots = ad.AnnData(stored, obs=section.spots.obs, var=section.spots.var, obsm=dict(section.spots.obsm))
        assert spots.X.nnz == n * g
        padded.append(Section(section.name, section.patient, spots))
    assert choose_panel(padded, protocol) == choose_panel(sections, protocol)


def test_only_genes_that_all_measure_are_chosen_and_others_counts_are_not_looked_at(three):
    a, b, c = three
    fewer = Section("B1", "B", b.spots[:, [f"g{i:02d}" for i in range(5, 60)]].copy())
    protocol = Protocol("x", n_hvg=60, min_spots=0, panel_size=None)
    everything = choose_panel([a, c], protocol)
    assert {"g01", "g02"} <= set(everything)
    assert set(choose_panel([a, fewer], protocol)).isdisjoint(f"g{i:02d}" for i in range(5))
    assert choose_panel([a, c], protocol, [fewer]) == [gene for gene in everything if gene >= "g05"]
    other = Section("B1", "B", with_counts(fewer, lambda dense: dense.fill(3)).spots)
    assert choose_panel([a, c], protocol, [other]) == choose_panel([a, c], protocol, [fewer])


def test_empty_spots_do_not_choose(three):
    def half_empty(dense):
        dense[::2] = 0

    section = with_counts(three[0], half_empty)
    full = Section("F", "F", section.spots[1::2].copy())
    every = Protocol("x", n_hvg=15, min_spots=0)
    assert choose_panel([section], every) == choose_panel([full], every)


def test_a_section_too_small_to_vary_leaves_the_choice_to_the_others(three, tmp_path):
    one = make_section(tmp_path, "D1", "D", 1, 60, image=False)
    empty = make_section(tmp_path, "E1", "E", 4, 60, image=False, counts=np.zeros((4, 60)))
    protocol = Protocol("x", n_hvg=20, min_spots=0)
    assert choose_panel([*three, one, empty], protocol) == choose_panel(three, protocol)


def test_no_panel_is_said_with_what_to_change(three, tmp_path):
    sparse = make_section(tmp_path, "S1", "S", 6, counts=np.eye(6, 30) * 5, image=False)
    with pytest.raises(InputError, match=r"100\.0% of the spots; lower protocol\.min_spots"):
        choose_panel([sparse], Protocol("x", min_spots=1.0))
    other = make_section(tmp_path, "Z1", "Z", genes=["ENSG01", "ENSG02"], image=False)
    with pytest.raises(InputError, match="no gene in common"):
        choose_panel([*three, other], STRICT)


# panel files


def test_panel_files(tmp_path):
    file = tmp_path / "panel.txt"
    file.write_text("ERBB2\nCD74\r\n\nCOL1A1\n")
    assert read_panel(file) == ["ERBB2", "CD74", "COL1A1"]
    file.write_text("ERBB2\nCD74\nERBB2\n")
    with pytest.raises(InputError, match=r"panel\.txt names a gene twice"):
        read_panel(file)
    file.write_text("\n")
    with pytest.raises(InputError, match=r"panel\.txt names no gene"):
        read_panel(file)
    with pytest.raises(InputError, match=r"gone\.txt does not exist"):
        read_panel(tmp_path / "gone.txt")


@pytest.mark.parametrize("scale", [{"library": "panel"}, {"truth": "gene"}, {}])
def test_genes_outside_of_the_panel_are_scaled_as_those_in_it(scale, tmp_path):
    section, protocol = make_section(tmp_path), Protocol("x", **scale)
    panel, genes = ["g03", "g01", "g07"], ["g01", "g20", "nowhere"]
    values = expression(section, genes, protocol, panel)
    counts = section.counts(genes).astype(np.float64)
    if protocol.truth == "gene":
        total = counts.sum(axis=0, keepdims=True)
    else:
        total = (section.counts(panel).sum(axis=1) if scale else section.total_counts)[:, None]
    np.testing.assert_allclose(values, np.log1p(counts * 1e4 / np.where(total == 0, 1, total)), rtol=1e-5)
    assert np.isnan(values[:, 2]).all()
