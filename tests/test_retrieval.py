"""Retrieval against one query at a time in numpy, and what it must not hold in memory."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch

from stexp.errors import InputError
from stexp.models.retrieval import Distance, ReferenceIndex, Weighting, choose_references, retrieve

N, Q, D, G, K = 60, 11, 6, 9, 7


def example(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reference embeddings, query embeddings, expression."""
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(N, D)).astype(np.float32),
        rng.normal(size=(Q, D)).astype(np.float32),
        rng.gamma(2, 1, size=(N, G)).astype(np.float32),
    )


def index_of(embedding: np.ndarray) -> ReferenceIndex:
    n = len(embedding)
    return ReferenceIndex(
        torch.from_numpy(embedding),
        np.array(["A1", "A2", "B1"])[np.arange(n) % 3],
        np.array(["A", "A", "B"])[np.arange(n) % 3],
    )


def slow_neighbours(reference: np.ndarray, q: np.ndarray, k: int, distance: str, weighting: str):
    """Rows, distances and weights for one query, in float64."""
    reference, q = reference.astype(float), q.astype(float)
    cosine = np.array([r @ q / np.linalg.norm(r) / np.linalg.norm(q) for r in reference])
    rows = np.argsort(-cosine)[:k]
    d = {
        "cosine": 1 - cosine[rows],
        "l1": np.abs(reference[rows] - q).sum(1),
        "l2": np.sqrt(((reference[rows] - q) ** 2).sum(1)),
    }[distance]
    w = {
        "inverse_square": 1 / d**2,
        "softmax": np.exp(-d),
        "mean": np.ones(k),
        "similarity": np.exp(cosine[rows] / 0.1),
    }[weighting]
    return rows, d, w / w.sum()


@pytest.mark.parametrize("distance", get_args(Distance))
@pytest.mark.parametrize("weighting", get_args(Weighting))
def test_one_search_for_several_k_is_a_search_for_each(distance, weighting):
    reference, queries, _ = example()
    reference *= 50  # far apart: of exp(-d) over all, nothing would be left for some
    index, queries = index_of(reference), torch.from_numpy(queries)
    for k, together in index.search_for(queries, [1, 5, N, 20], distance, weighting).items():
        alone = index.search(queries, k, distance, weighting)
        np.testing.assert_array_equal(together.index, alone.index)
        np.testing.assert_allclose(together.distance, alone.distance, rtol=1e-6)
        np.testing.assert_allclose(together.weight, alone.weight, rtol=1e-6)
        np.testing.assert_allclose(together.weight.sum(dim=1), 1, rtol=1e-5)


@pytest.mark.parametrize("distance", get_args(Distance))
@pytest.mark.parametrize("weighting", get_args(Weighting))
def test_equals_a_loop_over_queries(distance, weighting):
    reference, queries, expression = example()
    index = index_of(reference)
    found = index.search(torch.from_numpy(queries), K, distance, weighting)
    mean, sd = index.average(found, torch.from_numpy(expression), chunk_genes=4)
    table = index.provenance(found)
    for i, q in enumerate(queries):
        rows, d, w = slow_neighbours(reference, q, K, distance, weighting)
        np.testing.assert_array_equal(found.index[i], rows)
        np.testing.assert_allclose(found.distance[i], d, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.weight[i], w, rtol=1e-4)
        heaviest = np.argsort(-w, kind="stable")[:3]
        np.testing.assert_array_equal(found.heaviest(3)[0][i], rows[heaviest])
        np.testing.assert_allclose(found.heaviest(3)[1][i], w[heaviest], rtol=1e-4)
        expected = w @ expression[rows].astype(float)
        np.testing.assert_allclose(mean[i], expected, rtol=1e-5)
        np.testing.assert_allclose(sd[i], np.sqrt(w @ (expression[rows] - expected) ** 2), rtol=1e-3)
        for name, origin in (("section", np.array(["A1", "A2", "B1"])), ("patient", np.array(["A", "A", "B"]))):
            share = pd.Series(w).groupby(origin[rows % 3]).sum()
            assert table.loc[i, f"neighbour_{name}"] == share.idxmax()
            assert table.loc[i, f"neighbour_{name}_weight"] == pytest.approx(share.max(), rel=1e-4)
        assert table.loc[i, "neighbour_distance"] == pytest.approx(w @ d, rel=1e-4)
        assert table.loc[i, "neighbour_effective_k"] == pytest.approx(1 / (w**2).sum(), rel=1e-4)


@pytest.mark.parametrize(("chunk", "chunk_references"), [(1, 1), (2, 3), (5, 7), (3, N - 1), (Q, N), (1000, 1000)])
@pytest.mark.parametrize("distance", get_args(Distance))
def test_chunks_do_not_show(chunk, chunk_references, distance):
    reference, queries, _ = example()
    whole = index_of(reference).search(torch.from_numpy(queries), K, distance)
    parts = index_of(reference).search(
        torch.from_numpy(queries), K, distance, chunk=chunk, chunk_references=chunk_references
    )
    torch.testing.assert_close(parts.index, whole.index)
    torch.testing.assert_close(parts.distance, whole.distance, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-4, atol=1e-6)


def test_all_references_with_equal_weights_give_their_mean():
    reference, queries, expression = example()
    made = retrieve(index_of(reference), torch.from_numpy(queries), torch.from_numpy(expression), N, "l2", "mean")
    np.testing.assert_allclose(made.predicted, np.tile(expression.mean(0), (Q, 1)), rtol=1e-5)
    np.testing.assert_allclose(made.uncertainty, np.tile(expression.std(0), (Q, 1)), rtol=1e-4)
    np.testing.assert_allclose(made.obs["neighbour_effective_k"], N, rtol=1e-4)


def test_search_is_by_direction_and_weight_by_distance():
    reference = np.array([[1, 0], [10, 1], [0, 1]], dtype=np.float32)
    found = index_of(reference).search(torch.tensor([[10.0, 0.0]]), 2, "l2")
    assert found.index.tolist() == [[0, 1]]  # the same direction first, though it is farther away
    assert found.weight[0, 1] > 0.98


@pytest.mark.parametrize("distance", get_args(Distance))
@pytest.mark.parametrize("weighting", get_args(Weighting))
@pytest.mark.parametrize("duplicates", [1, 3])
def test_a_query_that_is_among_the_references_gets_finite_weights(distance, weighting, duplicates):
    reference, _, expression = example()
    reference[:duplicates] = reference[0]
    expression[:duplicates] = expression[0]
    index = index_of(reference)
    found = index.search(torch.from_numpy(reference[:1]), K, distance, weighting)
    assert set(found.index[0, :duplicates].tolist()) == set(range(duplicates))
    assert torch.isfinite(found.weight).all() and float(found.weight.sum()) == pytest.approx(1, rel=1e-5)
    mean, sd = index.average(found, torch.from_numpy(expression))
    assert torch.isfinite(mean).all() and torch.isfinite(sd).all()
    if weighting == "inverse_square" and distance != "cosine":
        np.testing.assert_allclose(mean[0], expression[0], rtol=1e-5)


def test_tiny_and_huge_embeddings_neither_overflow_nor_vanish():
    reference, queries, _ = example()
    for scale in (1e-8, 1e6):
        found = index_of(reference * np.float32(scale)).search(torch.from_numpy(queries * np.float32(scale)), K, "l2")
        plain = index_of(reference).search(torch.from_numpy(queries), K, "l2")
        torch.testing.assert_close(found.index, plain.index)
        torch.testing.assert_close(found.weight, plain.weight, rtol=1e-3, atol=1e-6)


def test_spread_keeps_its_digits_far_from_zero():
    reference, queries, expression = example()
    far = torch.from_numpy(expression * 0.01 + 500).float()
    index = index_of(reference)
    found = index.search(torch.from_numpy(queries), K)
    _, sd = index.average(found, far)
    for i in range(Q):
        values, w = far[found.index[i]].double().numpy(), found.weight[i].double().numpy()
        expected = np.sqrt(w @ (values - w @ values) ** 2)
        np.testing.assert_allclose(sd[i], expected, rtol=0.02)


def test_expression_keeps_its_type_and_is_not_changed():
    reference, queries, expression = example()
    index = index_of(reference)
    found = index.search(torch.from_numpy(queries), K)
    for values in (
        torch.from_numpy(expression),
        torch.from_numpy(expression).double(),
        torch.from_numpy(np.asfortranarray(expression)),
    ):
        before = values.clone()
        mean, sd = index.average(found, values)
        assert mean.dtype == sd.dtype == values.dtype
        torch.testing.assert_close(values, before, rtol=0, atol=0)
    assert index.average(found, torch.from_numpy(expression), spread=False)[1] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k=0, but there are 60 reference spots; choose 1 to 60"),
        ({"k": 61}, "k=61, but there are 60"),
        ({"k": 5, "distance": "L1"}, "distance=L1: choose cosine, l1 or l2"),
        ({"k": 5, "weighting": "gauss"}, "weighting=gauss: choose"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    reference, queries, _ = example()
    with pytest.raises(InputError, match=message):
        index_of(reference).search(torch.from_numpy(queries), **arguments)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="3 embeddings, 2 sections"):
        ReferenceIndex(torch.zeros(3, 2), np.array(["A", "B"]), np.array(["A", "B", "C"]))


def test_similarities_are_never_held_for_all_references(monkeypatch):
    reference, queries, _ = example()
    sizes, topk = [], torch.Tensor.topk

    def measured(self, *args, **kwargs):
        sizes.append(self.numel())
        return topk(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "topk", measured)
    index_of(reference).search(torch.from_numpy(queries), 3, chunk=4, chunk_references=10)
    assert max(sizes) <= 4 * 10


@pytest.mark.slow
def test_memory_does_not_grow_with_queries_times_references():
    code = """if True:
        import resource, sys, numpy as np, torch
        from stexp.models.retrieval import ReferenceIndex
        torch.set_num_threads(1)
        n, q = int(sys.argv[1]), 512
        draws = torch.Generator().manual_seed(0)
        origin = np.full(n, "A1")
        index = ReferenceIndex(torch.randn(n, 8, generator=draws), origin, origin)
        queries = torch.randn(q, 8, generator=draws)
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        index.search(queries[:8], 50, "l1", chunk=256, chunk_references=16384)  # what libraries allocate once
        before = peak()
        index.search(queries, 50, "l1", chunk=256, chunk_references=16384)
        print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", code, "300000"], capture_output=True, text=True, check=True)
    # 512 x 300,000 similarities would be 614 MB; 256 x 16,384 are 17 MB, held about three times
    assert float(done.stdout) < 200


SPOTS = pd.DataFrame(
    {
        "section": ["A1", "A1", "B1", "B2", "C1"],
        "role": ["train", "validation", "train", "reference", "reference"],
    }
)


@pytest.mark.parametrize(
    ("which", "rows"),
    [
        ("image", [0, 1, 2]),
        ("all", [0, 1, 2, 3, 4]),
        ("C1", [4]),
        (["B2", "A1"], [0, 1, 3]),
    ],
)
def test_references_are_chosen_by_image_or_name(which, rows):
    assert choose_references(SPOTS, which).tolist() == rows


@pytest.mark.parametrize(
    ("spots", "which", "message"),
    [
        (SPOTS, "Z9", "reference Z9 is not on the training side; choose image, all, or of A1, B1, B2, C1"),
        (SPOTS, ["A1", "T1"], "reference T1 is not"),
        (SPOTS[3:], "image", "reference=image leaves no spot to retrieve from"),
        (SPOTS, [], "leaves no spot"),
    ],
)
def test_references_that_are_not_there_are_refused(spots, which, message):
    with pytest.raises(InputError, match=message):
        choose_references(spots, which)


def test_neighbours_that_agree_have_next_to_no_spread_though_the_references_do():
    reference, queries, _ = example()
    expression = torch.zeros(N, 1)
    index = index_of(reference)
    found = index.search(torch.from_numpy(queries[:1]), K)
    expression[found.index[0]] = 7.3
    mean, sd = index.average(found, expression)
    assert float(mean) == pytest.approx(7.3, rel=1e-5)
    assert float(sd) < 0.01
