"""Rows of counts and of expression on every scale, against all of it at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sections import make_section

from stexp.data import rows as tables
from stexp.data.batches import SpotIndex, SpotTables
from stexp.data.expression import ExpressionTable, PanelCounts, expression_of
from stexp.data.genes import normalise
from stexp.data.kept_counts import smallest
from stexp.data.rows import RowTable, SomeRows, blocks, column_means, some_rows
from stexp.evaluation.floors import SpotTable, predict_floors
from stexp.evaluation.programmes import co_expressed_modules
from stexp.protocol import Protocol

PANEL = [f"g{i:02d}" for i in range(2, 14)]
SCALES = [
    Protocol("strict"),
    Protocol("panel", library="panel", log="log10"),
    Protocol("paper", truth="gene", library="panel", log="log10", target_sum=100.0),
    Protocol("residuals", truth="residuals"),
    Protocol("panel residuals", truth="residuals", library="panel"),
]


@pytest.mark.parametrize(
    ("numbers", "dtype"),
    [
        ([], np.uint8),
        ([0.0, 255.0], np.uint8),
        ([256.0], np.uint16),
        ([65_536.0], np.uint32),
        ([2.0**33, 1.0], np.float32),
    ],
)
def test_whole_numbers_in_the_smallest_type_that_holds_them(numbers, dtype):
    numbers = np.array(numbers, dtype=np.float32)
    assert smallest(numbers).dtype == dtype
    np.testing.assert_array_equal(smallest(numbers).astype(np.float64), numbers)


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    """The second lacks three genes of the panel; the first has a spot without counts and a gene that nobody has."""
    folder = tmp_path_factory.mktemp("sections")
    made = [make_section(folder, name, name, 20 + i, 16, image=False, seed=i) for i, name in enumerate("ABC")]
    counts = made[0].spots.X.toarray()
    counts[3], counts[:, 5] = 0, 0
    counts[7, 6:9] = 256, 70_000, 2**24  # of which each takes a wider type
    made[0] = make_section(folder, "A", "A", 20, 16, image=False, counts=counts)
    few = made[1].spots[:, [gene for gene in made[1].genes if gene not in ("g03", "g04", "g11")]].copy()
    return [made[0], replace(made[1], spots=few), made[2]]


@pytest.mark.parametrize("protocol", SCALES, ids=lambda protocol: protocol.name)
def test_rows_of_every_scale_are_those_of_whole_sections(sections, protocol):
    counts, read, truth = expression_of(PanelCounts.of(sections, PANEL), protocol)
    raw = [section.counts(PANEL) for section in sections]
    pairs = list(zip(raw, sections, strict=True))
    np.testing.assert_array_equal(np.asarray(counts), np.concatenate(raw))
    for table, scaling in ((read, "spot"), (truth, None)):
        whole = np.concatenate([normalise(part, each.total_counts, protocol, scaling) for part, each in pairs])
        drawn = np.random.default_rng(0).integers(0, len(whole), 90)
        np.testing.assert_array_equal(np.asarray(table), whole)
        np.testing.assert_array_equal(table[drawn], whole[drawn])
        assert table[drawn].dtype == np.float32 and table.shape == whole.shape and np.isnan(whole).any()


def test_a_table_is_indexed_as_an_array_is(sections):
    table = ExpressionTable(PanelCounts.of(sections, PANEL), SCALES[0])
    whole, mask = np.asarray(table), np.arange(len(table)) % 3 == 0
    keys = [5, -1, slice(3, 9), slice(None), mask, [4, 4, 0], np.array([[1, 2], [3, 60]]), (slice(None), slice(2, 4))]
    keys += [(3, 4), (-2, slice(5)), (mask, slice(1, 3)), ([1, 2], [3, -1]), np.ix_([7, 1], [2, 0, 0]), (mask, 2)]
    for key in keys:
        np.testing.assert_array_equal(table[key], whole[key], err_msg=str(key))
    for key in (len(table), [0, len(table)]):
        with pytest.raises(IndexError):
            table[key]
    np.testing.assert_array_equal(table.mean(axis=0), whole.mean(axis=0))
    np.testing.assert_array_equal(some_rows(some_rows(table, np.array([9, 3, 4])), np.array([2, 0]))[:], whole[[4, 9]])
    assert isinstance(some_rows(table, np.array([1])), SomeRows) and isinstance(some_rows(whole, [1]), np.ndarray)


def test_batches_are_the_same_from_small_tables_and_from_large_ones(sections, monkeypatch):
    counts, read, truth = expression_of(PanelCounts.of([sections[0], sections[2]], PANEL), SCALES[2])
    rng, index = np.random.default_rng(1), SpotIndex(torch.tensor([5, 0, 30, 5]))
    fields = {"expression": read, "target": truth, "counts": counts, "xy_um": rng.random((42, 2))}
    fields |= {"array_xy": rng.integers(0, 9, (42, 2)), "section": np.zeros(42, dtype=np.int64)}
    around = rng.integers(-1, 42, (42, 3))
    small = SpotTables(fields, around).take(index, None, torch.device("cpu"))
    monkeypatch.setattr("stexp.data.batches.WHOLE_BYTES", 0)
    large = SpotTables(fields, around).take(index, None, torch.device("cpu"))
    for name in ("expression", "target", "counts", "context_expression", "context_mask", "context_array_xy", "xy_um"):
        torch.testing.assert_close(getattr(large, name), getattr(small, name), rtol=0, atol=0)
    np.testing.assert_array_equal(small.context_expression[0, 1:][around[5] >= 0], read[around[5][around[5] >= 0]])


def test_what_is_learnt_by_blocks_is_what_is_learnt_at_once(monkeypatch):
    rng = np.random.default_rng(2)

    def table(n: int) -> SpotTable:
        features = rng.normal(size=(n, 12)) * rng.choice([0.1, 30], 12)
        expression = (features[:, :3] @ rng.normal(size=(3, 40)) + rng.normal(size=(n, 40))).astype(np.float32)
        expression[: n // 3, 7] = np.nan
        names = np.repeat(["A1", "A2", "B1"], -(-n // 3))[:n]
        colour, random = rng.normal(size=(n, 9)), [rng.normal(size=(n, 5))]
        return SpotTable(expression, rng.random(n), names, names, rng.random((n, 2)), colour, features, random=random)

    train, test = table(330), table(60)
    at_once = predict_floors(train, test), co_expressed_modules(train.expression, train.section)
    monkeypatch.setattr(tables, "WHOLE", 64)
    monkeypatch.setattr(tables, "AT_ONCE", 64)
    floors, modules = predict_floors(train, test), co_expressed_modules(train.expression, train.section)
    assert list(floors) == list(at_once[0])
    for name, values in floors.items():
        np.testing.assert_allclose(values, at_once[0][name], rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(modules, at_once[1])
    assert [block.stop - block.start for block in blocks(130)] == [64, 64, 2]
    values = rng.normal(size=(130, 4)).astype(np.float32)
    np.testing.assert_allclose(column_means(values), values.mean(axis=0), rtol=1e-5, atol=1e-7)


def test_all_of_a_table_is_a_copy():
    class Numbers(RowTable):
        shape = (4, 1)

        def take(self, rows):
            return rows[:, None].astype(np.float32)

    np.testing.assert_array_equal(Numbers().copy(), [[0], [1], [2], [3]])
    assert Numbers().astype(np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="copy"):
        np.asarray(Numbers(), copy=False)
