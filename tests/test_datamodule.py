from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import scipy.sparse as sp
import torch
from cut import cut_tiles
from encoders import MadeUpFeatures
from hypothesis import given
from hypothesis import strategies as st
from sections import make_section, make_sections

from stexp.data.augment import augment
from stexp.data.batches import ShuffledBatches, SpotBatch, SpotIndex, nearest
from stexp.data.datamodule import SpotDataModule
from stexp.data.genes import normalise
from stexp.data.identity import check_checkpoint
from stexp.data.section import Section
from stexp.data.slides.tiles import TileSpec
from stexp.errors import InputError
from stexp.models.method import Method, Prediction
from stexp.protocol import Protocol

STRICT = Protocol("strict", n_hvg=12, panel_size=10, min_spots=0)
PAPER = Protocol(
    "paper",
    hold_out="section",
    validation=False,
    panel="all",
    n_hvg=12,
    panel_size=None,
    min_spots=0,
    library="panel",
    log="log10",
    truth="gene",
)


@pytest.fixture
def sections(tmp_path) -> list[Section]:
    """Patients A to D with two sections each; D2 and E1 have no image. Sizes differ."""
    made = make_sections(tmp_path, patients=4, per_patient=1, n_spots=23)
    made += [make_section(tmp_path, f"{p}2", p, 17 + i, seed=50 + i) for i, p in enumerate("ABC")]
    made += [make_section(tmp_path, name, name[0], 9, image=False, seed=70) for name in ("D2", "E1")]
    return made


def module(sections, tmp_path, protocol=STRICT, fold="A", **kwargs) -> SpotDataModule:
    kwargs = {"tile_px": 8, "batch_size": 16, "eval_batch_size": 20, "n_neighbours": 4, **kwargs}
    return SpotDataModule(sections, protocol, fold, cache_dir=str(tmp_path / "cache"), **kwargs)


def rows_of(loader) -> np.ndarray:
    return torch.cat([index.rows for index in loader]).numpy()


# what a fold consists of


def test_every_spot_has_its_row_and_role(sections, tmp_path):
    data = module(sections, tmp_path)
    by_name = {section.name: section for section in sections}
    assert len(data.spots) == sum(len(by_name[name]) for name in data.section_names)
    assert data.spots.index.is_unique
    for name in data.section_names:
        table = data.spots[data.spots["section"] == name]
        assert list(table["spot"]) == list(by_name[name].spots.obs_names)
        np.testing.assert_array_equal(table["total_counts"], by_name[name].total_counts)
        np.testing.assert_array_equal(table[["array_x", "array_y"]], by_name[name].array_xy)
    assert data.names("test") == ["A1", "A2"]
    assert sorted(data.names("reference")) == ["D2", "E1"]
    covered = np.concatenate([data.rows(role) for role in ("train", "validation", "test", "reference")])
    np.testing.assert_array_equal(np.sort(covered), np.arange(len(data.spots)))
    assert data.array_size == 1 + max(section.array_xy.max() for section in sections)
    text = "\n".join(data.summary())
    assert f"test: {23 + 17} spots of 2 section(s): A1, A2" in text and "2 section(s) have counts but no image" in text


def scrambled(section: Section, seed: int = 9) -> Section:
    """The same section with each gene's name on another gene's counts."""
    spots = section.spots.copy()
    spots.X = spots.X[:, np.random.default_rng(seed).permutation(spots.n_vars)]
    return replace(section, spots=spots)


def test_the_strict_panel_does_not_see_the_test_patient(sections, tmp_path):
    panel = module(sections, tmp_path).panel
    changed = [scrambled(s) if s.patient == "A" else s for s in sections]
    assert module(changed, tmp_path).panel == panel
    assert module(sections, tmp_path).panel_saw == []
    changed = [scrambled(s) if s.patient in "BCD" else s for s in sections]
    assert module(changed, tmp_path).panel != panel
    assert module(sections[::-1], tmp_path).panel == panel


def test_the_papers_panel_sees_it(sections, tmp_path):
    data = module(sections, tmp_path, PAPER, "A1")
    changed = [scrambled(s) if s.name == "A1" else s for s in sections]
    assert module(changed, tmp_path, PAPER, "A1").panel != data.panel
    assert "A1" in data.panel_saw


def test_a_held_out_block_neither_trains_nor_chooses(sections, tmp_path):
    blocks = replace(STRICT, name="blocks", hold_out="block")
    one = module(sections, tmp_path, blocks, "block2")
    changed = []
    for section in sections:
        role = one.spots["role"].to_numpy()[one.spots["section"] == section.name]
        unused = np.isin(role, ("test", "gap"))
        spots = section.spots.copy()
        spots.X = sp.csr_matrix(np.where(unused[:, None], spots.X.toarray()[:, ::-1], spots.X.toarray()))
        changed.append(replace(section, spots=spots))
    other = module(changed, tmp_path, blocks, "block2")
    assert other.panel == one.panel and one.panel_saw == []
    keep = one.rows("train", "validation", "reference")
    np.testing.assert_array_equal(other.target[keep], one.target[keep])
    assert not np.array_equal(other.target[one.rows("test")], one.target[one.rows("test")])
    around = one.neighbours[one.rows("train")]
    assert set(one.spots["role"].to_numpy()[around[around >= 0]]) == {"train"}


def test_nothing_of_training_depends_on_the_test_patient(sections, tmp_path):
    one = module(sections, tmp_path)
    other = module([scrambled(s) if s.patient == "A" else s for s in sections], tmp_path)
    keep = one.rows("train", "validation", "reference")
    for name in ("counts", "expression", "target", "neighbours"):
        np.testing.assert_array_equal(getattr(one, name)[keep], getattr(other, name)[keep])


def lacking(section: Section, genes: list[str]) -> Section:
    return replace(section, spots=section.spots[:, [g for g in section.genes if g not in genes]].copy())


def test_genes_that_a_section_does_not_measure(sections, tmp_path, caplog):
    panel = [f"g{i:02d}" for i in range(6)]
    training = [lacking(s, ["g02", "g03"]) if s.name == "B1" else s for s in sections]
    with pytest.raises(InputError, match=r"section B1 does not measure 2 of the 6 panel genes \(g02, g03\)"):
        module(training, tmp_path, panel=panel)
    test = [lacking(s, ["g02"]) if s.name == "A1" else s for s in sections]
    data = module(test, tmp_path, panel=panel)
    assert "A1 does not measure 1 of the 6 panel genes (g02)" in caplog.text
    unmeasured = np.isnan(data.target)
    assert unmeasured[data.spots["section"] == "A1"].tolist() == [[False, False, True, False, False, False]] * 23
    assert not unmeasured[data.spots["section"] != "A1"].any()


# loaders


@given(n=st.integers(2, 70), size=st.integers(2, 30), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_an_epoch_has_every_spot_once_and_no_spot_alone(n, size, seed, epoch):
    rows = np.arange(n) * 3 + 1
    batches = ShuffledBatches(rows, size, seed)
    batches.set_epoch(epoch)
    drawn = list(batches)
    assert len(drawn) == len(batches)
    np.testing.assert_array_equal(np.sort(rows_of(drawn)), rows)
    sizes = [len(index.rows) for index in drawn]
    assert min(sizes) >= 2 and max(sizes) <= size + 1 and all(s == size for s in sizes[:-1])
    assert len({index.seed for index in drawn}) == len(drawn)


def test_order_and_augmentation_follow_seed_and_epoch_alone():
    def drawn(seed, epoch):
        batches = ShuffledBatches(np.arange(60), 16, seed)
        batches.set_epoch(epoch)
        return [(index.rows.tolist(), index.seed) for index in batches]

    first = drawn(0, 0)
    torch.manual_seed(5)
    assert drawn(0, 0) == first
    others = [drawn(0, 1), drawn(1, 0), drawn(1, 1), drawn(2, 0)]
    for i, other in enumerate(others):
        assert all(other[0] != earlier[0] for earlier in [first, *others[:i]])
    assert rows_of(ShuffledBatches(np.arange(60), 16, 0)).tolist() != list(range(60))


def test_loaders_draw_nothing_from_the_global_generator(sections, tmp_path):
    """A resumed run starts its loader elsewhere, and must draw the same dropout."""
    data = module(sections, tmp_path)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(data.train_dataloader())
    assert torch.equal(torch.rand(3), expected)


def test_the_digest_covers_what_methods_read(sections, tmp_path):
    before = module(sections, tmp_path).digest
    sections[0].spots.obs["array_x"] = sections[0].spots.obs["array_x"].to_numpy()[::-1]
    assert module(sections, tmp_path).digest != before


def test_loaders_carry_indices_only(sections, tmp_path):
    data = module(sections, tmp_path)
    data.setup()
    loaders = [data.train_dataloader(), data.val_dataloader(), data.predict_dataloader(), data.loader("reference")]
    for loader, role in zip(loaders, ("train", "validation", "test", "reference"), strict=True):
        indices = list(loader)
        assert all(isinstance(index, SpotIndex) for index in indices)
        assert max(len(pickle.dumps(index)) for index in indices) < 2000
        np.testing.assert_array_equal(np.sort(rows_of(indices)), data.rows(role))
        if role != "train":
            assert [index.seed for index in indices] == [None] * len(indices)
            np.testing.assert_array_equal(rows_of(indices), data.rows(role))
    assert all(index.seed is not None for index in loaders[0])


class Recorder(Method):
    """Learns one number and writes down what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[int, list] = {}

    def training_step(self, batch: SpotBatch, batch_idx: int) -> torch.Tensor:
        assert isinstance(batch, SpotBatch)
        self.seen.setdefault(self.current_epoch, []).append((batch.spot.tolist(), float(batch.image.double().sum())))
        return (self.weight - batch.expression.mean()) ** 2

    def predict_step(self, batch: SpotBatch, batch_idx: int = 0) -> Prediction:
        return Prediction(self.weight.expand_as(batch.target))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, epochs: int, folder, ckpt_path=None) -> dict[int, list]:
    model = Recorder()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return model.seen


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_sees_the_batches_of_one_that_was_not_interrupted(sections, tmp_path):
    whole = fit(module(sections, tmp_path, seed=3), 4, tmp_path)
    assert sorted(whole) == [0, 1, 2, 3]
    assert len({str(epoch) for epoch in whole.values()}) == 4
    first = fit(module(sections, tmp_path, seed=3), 2, tmp_path)
    resumed = fit(module(sections, tmp_path, seed=3), 4, tmp_path, tmp_path / "2.ckpt")
    assert sorted(resumed) == [2, 3] and {**first, **resumed} == whole
    assert fit(module(sections, tmp_path, seed=4), 1, tmp_path)[0] != whole[0]
    with pytest.raises(InputError, match="the checkpoint predicts 10 genes, 1 of them are not in the panel"):
        panel = [*module(sections, tmp_path).panel[1:], "other"]
        fit(module([_with_gene(s, "other") for s in sections], tmp_path, panel=panel), 4, tmp_path, tmp_path / "2.ckpt")


def _with_gene(section: Section, name: str) -> Section:
    spots = section.spots.copy()
    spots.var_names = [name, *spots.var_names[1:]] if name not in spots.var_names else spots.var_names
    return replace(section, spots=spots)


# batches


@pytest.mark.parametrize(("protocol", "fold"), [(STRICT, "A"), (PAPER, "B2")])
def test_a_batch_holds_what_a_direct_computation_gives(sections, tmp_path, protocol, fold):
    data = module(sections, tmp_path, protocol, fold)
    by_name = {section.name: section for section in sections}
    rows = np.random.default_rng(0).permutation(data.rows("train", "validation", "test"))[:40]
    batch = data.batch(SpotIndex(torch.from_numpy(rows), seed=None))
    assert len(batch) == 40 and batch.spot.tolist() == rows.tolist()
    for b, row in enumerate(rows):
        entry = data.spots.iloc[row]
        section = by_name[entry["section"]]
        i = list(section.spots.obs_names).index(entry["spot"])
        assert data.section_names[batch.section[b]] == section.name
        counts = section.counts(data.panel)
        np.testing.assert_array_equal(batch.counts[b], counts[i])
        np.testing.assert_array_equal(batch.expression[b], normalise(counts, section.total_counts, protocol, "spot")[i])
        np.testing.assert_array_equal(batch.target[b], normalise(counts, section.total_counts, protocol)[i])
        np.testing.assert_allclose(batch.xy_um[b], section.xy_px[i] * 0.5, rtol=1e-6)
        np.testing.assert_array_equal(batch.array_xy[b], section.array_xy[i])
        tile = np.zeros((1, 8, 8, 3), np.uint8)
        cut_tiles(section.slide.read(), section.xy_px[i : i + 1], 8, 8, tile)
        np.testing.assert_array_equal(batch.image[b].numpy(), tile[0].transpose(2, 0, 1).astype(np.float32) / 255)
    if protocol is PAPER:
        assert not np.allclose(batch.expression, batch.target)


@pytest.mark.parametrize("n_neighbours", [0, 4, 30])
def test_context_is_the_spot_and_its_nearest_of_the_same_section_and_role(tmp_path, n_neighbours):
    # one training section: part of it validates, so that roles meet inside a section
    sections = [make_section(tmp_path, "A1", "A", 12), make_section(tmp_path, "B1", "B", 36, seed=1)]
    data = module(sections, tmp_path, n_neighbours=n_neighbours)
    batch = data.batch(SpotIndex(torch.arange(len(data.spots)), image=False))
    assert batch.image is None
    width = 1 + min(n_neighbours, 26)  # the largest group has 27 spots
    assert batch.context_expression.shape == (48, width, 10)
    role, name = data.spots["role"].to_numpy(), data.spots["section"].to_numpy()
    assert set(role) == {"test", "train", "validation"}
    xy = np.concatenate([section.xy_px for section in sections])
    for row in range(48):
        others = [r for r in range(48) if r != row and role[r] == role[row] and name[r] == name[row]]
        others.sort(key=lambda r: (round(float(np.hypot(*(xy[r] - xy[row]))), 6), *xy[r]))
        expected = [row, *others[:n_neighbours]]
        n = len(expected)
        assert batch.context_mask[row].tolist() == [True] * n + [False] * (width - n)
        np.testing.assert_array_equal(batch.context_expression[row, :n], data.expression[expected])
        np.testing.assert_array_equal(
            batch.context_array_xy[row, :n], data.spots.iloc[expected][["array_x", "array_y"]]
        )


@pytest.mark.parametrize("protocol", [STRICT, PAPER])
def test_neighbours_never_cross_section_or_role(sections, tmp_path, protocol):
    data = module(sections, tmp_path, protocol, "B" if protocol is STRICT else "B1", n_neighbours=20)
    unit = (data.spots["section"] + data.spots["role"]).to_numpy()
    row, column = np.nonzero(data.neighbours >= 0)
    around = data.neighbours[row, column]
    assert (unit[row] == unit[around]).all() and (row != around).all()
    n_of = data.spots.groupby(["section", "role"])["spot"].transform("size").to_numpy()
    np.testing.assert_array_equal((data.neighbours >= 0).sum(1), np.minimum(20, n_of - 1))


@given(
    points=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=60, unique=True),
    n=st.integers(0, 13),
    scale=st.sampled_from([1.0, 287.3]),
)
def test_nearest_equals_sorting_all_distances(points, n, scale):
    xy = np.array(points) * scale
    distance = np.round(np.hypot(*(xy[:, None] - xy[None]).transpose(2, 0, 1)), 6)
    got = nearest(xy, n)
    assert got.shape == (len(xy), min(n, len(xy) - 1))
    for i, row in enumerate(got):
        others = sorted((j for j in range(len(xy)) if j != i), key=lambda j: (distance[i, j], *points[j]))
        assert row.tolist() == others[:n]


def test_only_training_batches_are_augmented_and_by_their_seed(sections, tmp_path):
    data = module(sections, tmp_path, augmentation="paper")
    index = next(iter(data.train_dataloader()))
    tiles = data.tiles(index.rows.numpy())
    torch.testing.assert_close(data.batch(index).image, augment(tiles, "paper", index.seed), rtol=0, atol=0)
    plain = data.batch(SpotIndex(index.rows)).image
    torch.testing.assert_close(plain, augment(tiles, "none", 0), rtol=0, atol=0)
    zero = data.batch(SpotIndex(index.rows, seed=0)).image
    torch.testing.assert_close(zero, augment(tiles, "paper", 0), rtol=0, atol=0)
    assert not torch.equal(zero, plain)


def test_unknown_scale_gives_nan_micrometres(sections, tmp_path):
    data = module([replace(s, um_per_px=None) if s.name == "B1" else s for s in sections], tmp_path)
    nan = np.isnan(data.xy_um).any(1)
    without = data.spots["section"].isin(["B1", "D2", "E1"])
    np.testing.assert_array_equal(nan, without)


def test_tiles_of_spots_without_an_image(sections, tmp_path):
    data = module(sections, tmp_path)
    rows = data.rows("reference")
    assert data.batch(SpotIndex(torch.from_numpy(rows), image=False)).expression.shape == (18, 10)
    with pytest.raises(InputError, match="spots of D2, E1 have no image"):
        data.batch(SpotIndex(torch.from_numpy(rows)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_batch_on_a_gpu_equals_the_cpus(sections, tmp_path):
    data = module(sections, tmp_path)
    index = SpotIndex(torch.from_numpy(data.rows("train")))
    here, there = data.batch(index), data.batch(index, "cuda")
    for name, value in vars(here).items():
        assert getattr(there, name).is_cuda
        torch.testing.assert_close(getattr(there, name).cpu(), value, equal_nan=True)


# frozen features


def test_features_are_computed_once_and_cannot_be_set(sections, tmp_path):
    n = len(module(sections, tmp_path).spots)
    encoder = MadeUpFeatures(np.random.default_rng(0).normal(size=(n, 7)).astype(np.float32))
    data = module(sections, tmp_path, encoder=encoder)
    assert data.n_features == 7
    data.setup()
    data.setup()
    with_image = data.rows("train", "validation", "test")
    assert encoder.taken == len(with_image) < n, "once, of spots with an image"
    np.testing.assert_array_equal(data.features[with_image], encoder.table[: len(with_image)])
    assert np.isnan(data.features[data.rows("reference")]).all()
    batch = data.batch(SpotIndex(torch.from_numpy(with_image[[3, 1]]), image=False))
    np.testing.assert_array_equal(batch.features, encoder.table[[3, 1]])
    with pytest.raises(AttributeError):
        data.features = encoder.table


def test_without_an_encoder_there_are_no_features(sections, tmp_path):
    data = module(sections, tmp_path)
    assert data.features is None and data.n_features is None
    with pytest.raises(ValueError, match="encoder"):
        data.surroundings(3)


def test_what_a_batch_is_depends_on_the_method_of_the_trainer(sections, tmp_path):
    data = module(sections, tmp_path)
    method = SimpleNamespace(batching="section", frozen_encoder=None)
    data.trainer = SimpleNamespace(lightning_module=method, global_rank=0, world_size=1)
    for loader, role in ((data.train_dataloader(), "train"), (data.predict_dataloader(), "test")):
        batches = [index.rows.numpy() for index in loader]
        assert len(batches) == len(data.names(role)) and all(
            data.spots["section"].iloc[rows].nunique() == 1 for rows in batches
        )
        assert sorted(np.concatenate(batches)) == data.rows(role).tolist()
    assert max(len(index.rows) for index in data.loader("test", batch_size=5)) == 5


# checkpoints and arguments


def test_a_checkpoint_of_other_data_is_refused(sections, tmp_path):
    data = module(sections, tmp_path)
    state = data.state_dict()
    data.load_state_dict(state)
    fits = (state["panel"], data.tile, data.array_size)
    check_checkpoint(state, *fits)
    check_checkpoint(state, *fits[:2], data.array_size - 1)
    missing = state["panel"][2:9]
    with pytest.raises(InputError) as caught:
        check_checkpoint(state, [*state["panel"][:2], *state["panel"][9:], "new"], *fits[1:])
    assert "predicts 10 genes, 7 of them are not in the panel of this data" in str(caught.value)
    assert str(caught.value).endswith(f"{', '.join(missing[:5])}, ...")
    for other in (state["panel"][::-1], [*state["panel"], "more"]):
        with pytest.raises(InputError, match=f"the panel of this data has {len(other)}, or another order"):
            check_checkpoint(state, other, *fits[1:])
    for tile in (TileSpec(9), TileSpec(8, 55.0)):
        with pytest.raises(InputError, match=r"trained on tiles of 8 px \(None um\)"):
            check_checkpoint(state, fits[0], tile, fits[2])
    with pytest.raises(InputError, match=f"below {data.array_size}, this data goes up to {data.array_size}"):
        check_checkpoint(state, *fits[:2], data.array_size + 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 1}, r"data\.batch_size=1: a whole number of at least 2"),
        ({"augmentation": "flip"}, r"data\.augmentation=flip: choose none, dihedral, paper"),
        ({"placement": "gpu"}, r"data\.placement=gpu: choose auto, device, pinned or disk"),
        ({"fold": "Q"}, "fold=Q is no patient with an image; choose one of A, B, C, D, or all"),
    ],
)
def test_arguments_that_do_not_fit(sections, tmp_path, wrong, message):
    with pytest.raises(InputError, match=message):
        module(sections, tmp_path, **wrong).setup()
