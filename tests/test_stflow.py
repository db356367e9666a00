"""STFlow: its size, its network against loops, its prior and steps, and that turning a section changes nothing."""

from __future__ import annotations

import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from encoders import frozen
from hypothesis import given, settings
from hypothesis import strategies as st
from sections import make_data, make_trainer
from torch.nn import functional as F

from stexp.data.batches import SpotIndex
from stexp.data.datamodule import SpotDataModule
from stexp.errors import InputError
from stexp.models.encoders.image import ImageEncoder
from stexp.models.frame_attention import SIGNS, FrameAttention, surrounding
from stexp.models.stflow import Prior, STFlow, frequencies
from stexp.protocol import Protocol

SMALL = {"dim": 16, "depth": 2, "heads": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SpotDataModule:
    folder = tmp_path_factory.mktemp("sections")
    torch.manual_seed(0)
    encoder = ImageEncoder("test_resnet", pretrained=False)
    return make_data(folder, Protocol("strict"), encoder=frozen(encoder, folder / "cache"))


def make_model(data: SpotDataModule, *, seed: int = 0, **kwargs) -> STFlow:
    torch.manual_seed(seed)
    model = STFlow(len(data.panel), data.n_features, **SMALL | kwargs).eval()
    model._trainer = SimpleNamespace(datamodule=data, ckpt_path=None)
    model.log = lambda *args, **kwargs: None
    return model


def section(data: SpotDataModule, name: str):
    rows = np.flatnonzero(data.spots["section"] == name)
    return data.batch(SpotIndex(torch.from_numpy(rows), image=False))


def predict(model: STFlow, batch) -> torch.Tensor:
    with torch.no_grad():
        return model.predict_step(batch).predicted


# the network


def test_published_size():
    with torch.device("meta"):
        model = STFlow(50, 1024)

    def mlp(n_in: int, hidden: int, n_out: int) -> int:  # two gates of half the width, a norm, and the way out
        return (n_in + 1) * hidden + 2 * (hidden // 2) + (hidden // 2 + 1) * n_out

    dim, head = 128, 32
    attention = 2 * dim + (dim + 1) * 3 * dim + mlp(3, dim, dim) + mlp(3 * head + 50, dim, 1) + mlp(2 * dim, dim, dim)
    block = attention + mlp(dim, 4 * dim, dim) + (dim + 1) * dim + 2 * dim + (dim + 1) * 50
    size = (1024 + 1) * dim + (256 + 1) * dim + (dim + 1) * dim + 4 * block
    assert sum(parameter.numel() for parameter in model.parameters()) == size


def gated(x: torch.Tensor, mlp: torch.nn.Module) -> torch.Tensor:
    gate, value = (mlp.fc1.weight @ x + mlp.fc1.bias).chunk(2)
    hidden = F.silu(gate) * value
    return mlp.fc2.weight @ F.layer_norm(hidden, hidden.shape, mlp.norm.weight, mlp.norm.bias) + mlp.fc2.bias


@torch.no_grad()
def test_attention_equals_a_loop_over_spots_neighbours_frames_and_heads():
    torch.manual_seed(0)
    n, dim, genes, heads = 7, 8, 5, 2
    attention = FrameAttention(dim, genes, heads, dropout=0.5).eval()
    xy = np.random.default_rng(0).uniform(0, 10, (n, 2))
    x, y = torch.randn(n, dim), torch.randn(n, genes)
    made = attention(x, y, surrounding(xy, 3))
    normed = F.layer_norm(x, (dim,), attention.norm.weight, attention.norm.bias)
    q, k, v = attention.to_qkv(normed).chunk(3, dim=1)
    apart = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    unit = np.median(np.sort(apart, axis=1)[:, 1])
    own_axes = np.cov(xy.T, bias=True)
    for i in range(n):
        near = np.argsort(apart[i])[1:4]
        offsets = (xy[near] - xy[i]) / unit
        centred = offsets - offsets.mean(axis=0)
        direction = centred.T @ centred
        axes = np.linalg.eigh(direction / np.trace(direction) + 1e-3 * own_axes / np.trace(own_axes))[1]
        edges, logits = [], []
        for j, offset, place in zip(near, offsets, centred, strict=True):
            frames = [np.append(sign * (place @ axes), np.linalg.norm(offset)) for sign in SIGNS.numpy()]
            edge = torch.stack([gated(torch.tensor(f, dtype=torch.float32), attention.edge_mlp) for f in frames])
            edges.append(edge.mean(dim=0))
            parts = [(q[i].chunk(heads)[h], k[j].chunk(heads)[h], edges[-1].chunk(heads)[h]) for h in range(heads)]
            logits.append(torch.cat([gated(torch.cat([*p, y[j] - y[i]]), attention.logit_mlp) for p in parts]))
        weight = torch.stack(logits).softmax(dim=0)  # (K, heads)
        gathered = [
            torch.cat([sum(weight[m, h] * value[m].chunk(heads)[h] for m in range(3)) for h in range(heads)])
            for value in ([v[j] for j in near], edges)
        ]
        torch.testing.assert_close(made[i], gated(torch.cat(gathered), attention.out_mlp), rtol=1e-4, atol=1e-4)


def test_time_is_told_by_sines_and_cosines():
    told = frequencies(torch.tensor(0.3))
    assert told.shape == (256,)
    np.testing.assert_allclose(told[[0, 128]], [np.cos(0.3), np.sin(0.3)], rtol=1e-6)
    np.testing.assert_allclose(told[64], np.cos(0.3 / 100), rtol=1e-6)


# how a section lies


ARRAYS = {
    "square": np.stack(np.meshgrid(np.arange(6.0), np.arange(5.0)), axis=-1).reshape(-1, 2),
    "hexagonal": np.array([(x + 0.5 * (y % 2), y * 3**0.5 / 2) for y in range(5) for x in range(7)]),
    "free": np.random.default_rng(1).uniform(0, 6, (30, 2)),
}


@pytest.fixture(scope="module")
def network() -> STFlow:
    torch.manual_seed(0)
    return STFlow(5, 6, **SMALL).eval()


@settings(max_examples=12, deadline=None)
@given(
    array=st.sampled_from(sorted(ARRAYS)),
    angle=st.floats(0, 2 * np.pi),
    mirrored=st.booleans(),
    size=st.floats(0.01, 1e4),
    shift=st.floats(-1e5, 1e5),
)
def test_turning_mirroring_scaling_and_moving_a_section_changes_nothing(network, array, angle, mirrored, size, shift):
    xy, draws = ARRAYS[array], torch.Generator().manual_seed(0)
    y, features = torch.rand(len(xy), 5, generator=draws), torch.randn(len(xy), 6, generator=draws)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = size * (xy * [-1 if mirrored else 1, 1] @ turn.T) + shift
    with torch.no_grad():
        first, second = (network.flow(y, features, surrounding(places, 8)) for places in (xy, moved))
        torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-3)
        squeezed = network.flow(y, features, surrounding(xy * [1, 0.5], 8))
    assert float((squeezed - first).abs().max()) > 1e-2, "places do count"


def test_neighbours_are_the_nearest_and_all_as_near():
    around = surrounding(ARRAYS["hexagonal"], 8)
    middle = 2 * 7 + 3
    near = around.index[middle][around.present[middle]].tolist()
    apart = np.linalg.norm(ARRAYS["hexagonal"] - ARRAYS["hexagonal"][middle], axis=1)
    assert sorted(near) == np.flatnonzero((apart > 0) & (apart < 1.8)).tolist() and len(near) == 12
    few = surrounding(ARRAYS["free"][:3], 8)
    assert few.present.all() and few.index.shape == (3, 2)


@torch.no_grad()
def test_a_section_of_one_spot_is_predicted(network):
    alone = surrounding(np.array([[3.0, 4.0]]), 8)
    assert torch.isfinite(network.flow(torch.zeros(1, 5), torch.randn(1, 6), alone)).all()


# prior and steps


def test_the_prior_is_a_negative_binomial_with_more_zeros():
    counts = np.expm1(Prior(1.0, 0.1, 0.0).draw((200, 1000), np.random.default_rng(0)).numpy())
    mean = np.exp(0.1)  # of torch.distributions.NegativeBinomial(1, logits=0.1)
    assert abs(counts.mean() - mean / 2) < 0.02
    assert abs((counts == 0).mean() - (0.5 + 0.5 / (1 + mean))) < 0.005
    np.testing.assert_allclose(counts, counts.round(), atol=1e-4)
    assert Prior(2.0, 0.0, -10.0).draw((1000, 1000), np.random.default_rng(0)).expm1().mean() == pytest.approx(2, 0.02)


@torch.no_grad()
def test_a_prediction_goes_by_five_times_and_ends_at_the_last_guess(network, monkeypatch):
    seen = []

    def guess(y, t, features, around):
        seen.append((float(t), y.clone()))
        return torch.full_like(y, 3.0) - 10 * (torch.arange(5) == 0)

    monkeypatch.setattr(network, "forward", guess)
    start = torch.rand(4, 5)
    end = network.flow(start, torch.zeros(4, 6), None)
    assert torch.equal(end, torch.tensor([0.0, 3, 3, 3, 3]).expand(4, 5)), "none is below 0"
    np.testing.assert_allclose([t for t, _ in seen], [0.01, 0.2575, 0.505, 0.7525], rtol=1e-5)
    y = start
    for (t, state), then in zip(seen, [0.2575, 0.505, 0.7525, 1.0], strict=True):
        torch.testing.assert_close(state, y)
        y = y + (then - t) * (torch.full_like(y, 3.0) - 10 * (torch.arange(5) == 0) - y) / (1 - t)


def test_predictions_repeat_for_a_seed_and_several_draws_say_how_far_they_spread(data):
    batch = section(data, "C1")
    model = make_model(data)
    first = predict(model, batch)
    torch.rand(3)
    assert torch.equal(predict(model, batch), first)
    assert not torch.equal(predict(model, section(data, "C2")), first)
    model.seed = 1
    assert not torch.equal(predict(model, batch), first)
    model.seed, model.draws = 0, 3
    with torch.no_grad():
        several = model.predict_step(batch)
    assert several.uncertainty is not None and float(several.uncertainty.mean()) > 0
    rng = np.random.default_rng([0, zlib.crc32(b"C1")])
    with torch.no_grad():
        ends = [
            model.flow(model.prior.draw(batch.target.shape, rng), batch.tile_features, model.around(batch))
            for _ in range(3)
        ]
    torch.testing.assert_close(several.predicted, torch.stack(ends).mean(dim=0))
    torch.testing.assert_close(several.uncertainty, torch.stack(ends).std(dim=0))
    torch.testing.assert_close(ends[0], first)


def test_features_and_last_layers_start_from_the_training_spots_where_asked(data):
    model = make_model(data, standardise=True, start_from_mean=True)
    model.on_fit_start()
    rows, features = data.rows("train"), data.tile_features
    batch = data.batch(SpotIndex(torch.from_numpy(rows), image=False))
    entered = (batch.tile_features - model.centre) / model.scale
    np.testing.assert_allclose(entered.mean(dim=0), 0, atol=1e-3)
    np.testing.assert_allclose(model.scale, features[rows].std(axis=0), rtol=1e-3)
    for block in model.blocks:
        np.testing.assert_allclose(block.last.bias.detach(), data.target[rows].mean(axis=0), rtol=1e-4)
    model._trainer = SimpleNamespace(datamodule=data, ckpt_path="last.ckpt")
    model.centre.fill_(7.0)  # as of a training that goes on
    model.on_fit_start()
    assert (model.centre == 7).all()


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"model\.dim=18.*model\.heads=4"):
        STFlow(5, 6, dim=18)
    with pytest.raises(InputError, match=r"model\.n_times=1"):
        STFlow(5, 6, n_times=1)


# training


def test_overfits_a_few_spots_with_the_published_optimizer(data):
    model = make_model(data, dim=64, dropout=0.0, output_dropout=0.0, lr=5e-3, start_from_mean=True)
    model.on_fit_start()
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    batch = data.batch(SpotIndex(torch.from_numpy(data.rows("train")[:8]), image=False))
    model.train()
    for _ in range(120):
        optimizer.zero_grad()
        model.training_step(batch, 0).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), model.clip)
        optimizer.step()
    residual = predict(model.eval(), batch) - batch.target
    assert float(residual.square().mean()) < 0.1 * float(batch.target.var(dim=0, correction=0).mean())


def test_trains_on_whole_sections_of_kept_features_and_clips(data, tmp_path, monkeypatch):
    monkeypatch.setattr("stexp.data.datamodule.augment", lambda *_: pytest.fail("tiles are gathered"))
    torch.manual_seed(0)
    model, trainer = STFlow(len(data.panel), data.n_features, **SMALL), make_trainer(tmp_path, epochs=2)
    clipped, sizes, around = [], [], model.around
    monkeypatch.setattr(model, "clip_gradients", lambda optimizer, value, how: clipped.append((value, how)))
    monkeypatch.setattr(model, "around", lambda batch: sizes.append(len(batch)) or around(batch))
    data.augmentation = "dihedral"  # of tiles, which nothing reads
    try:
        trainer.fit(model, datamodule=data)
        made = trainer.predict(model, datamodule=data)
    finally:
        data.augmentation = "none"
    n = 2 * len(data.names("train"))
    assert set(sizes) == {25} and clipped == [(1.0, "norm")] * n
    again = make_model(data, seed=1)
    again.load_state_dict(model.state_dict())
    for part, name in zip(made, ("C1", "C2"), strict=True):
        torch.testing.assert_close(predict(again, section(data, name)), part.predicted, rtol=1e-4, atol=1e-5)
