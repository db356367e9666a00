"""EGN: its architecture against a slow one under the authors' names, its exemplars, its loss, that it learns."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from encoders import MadeUpFeatures
from scipy.special import erf, expit, softmax
from sections import make_data

from stexp.data.batches import SpotIndex
from stexp.data.datamodule import SpotDataModule
from stexp.errors import InputError
from stexp.models.egn import EGN, nearest_exemplars, restarts
from stexp.models.losses import correlation_loss
from stexp.protocol import Protocol

SMALL = {"tile_px": 16, "patch_px": 8, "dim": 12, "depth": 2, "heads": 3, "head_dim": 5, "hidden": 20}
BRIDGE = {"bridge_heads": 2, "bridge_dim": 7, "projector_depth": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SpotDataModule:
    features = np.random.default_rng(0).normal(size=(150, 9)).astype(np.float32)
    return make_data(tmp_path_factory.mktemp("sections"), Protocol("strict"), encoder=MadeUpFeatures(features))


def make_model(n_genes: int = 30, n_features: int = 9, *, seed: int = 0, **kwargs) -> EGN:
    torch.manual_seed(seed)
    return EGN(n_genes, n_features, **{**SMALL, **BRIDGE, "n_exemplars": 4, **kwargs}).eval()


def test_published_size():
    with torch.device("meta"):
        model = EGN(250, 2048, tile_px=256)
    d, patches = 1024, 64

    def linear(n_in, n_out):
        return n_in * n_out + n_out

    norm = 2 * d
    block = 2 * norm + 3 * d * d + linear(d, d) + linear(d, 4096) + linear(4096, d)
    related = linear(2 * d, 4 * 64) + linear(4 * 64, 2 * d)  # four heads, whatever the bridge has
    bridge = related + linear(d, d) + 3 * norm + linear(d, patches * 8) + linear(d, 8 * 64) + 2 * 8 * 64 * d
    shared = norm + 2 * linear(d, d)
    projector = linear(2048, d) + linear(2048 + 250, d) + 2 * shared + linear(250, d)
    head = 2 * 2 * d + linear(2 * d, 250)
    expected = linear(3 * 32 * 32, d) + patches * d + projector + 8 * block + 4 * bridge + linear(d, d) + head
    assert sum(p.numel() for p in model.parameters()) == expected == 131_254_522
    assert sorted(model.bridges) == ["1", "3", "5", "7"]


def authors_state(n_genes: int, n_features: int) -> dict[str, np.ndarray]:
    """Random weights of a small network, named and shaped as github.com/Yan98/EGN names and shapes them."""
    d, inner, hidden, patches, px = 12, 15, 20, 4, 8
    shapes = {"pos_embedding": (1, patches + 1, d), "to_patch_embedding.1": (d, 3 * px * px)}
    shapes |= {"transformer.encoder.proq": (d, n_features), "transformer.encoder.proe": (d, n_features + n_genes)}
    for i in range(2):
        layer = f"transformer.encoder.layers.{i}"
        shapes |= {f"{layer}.norm": (d,), f"{layer}.fn.net.0": (d, d), f"{layer}.fn.net.3": (d, d)}
        attn, ff = f"transformer.layers.{i}.0", f"transformer.layers.{i}.2"
        shapes |= {f"{attn}.norm": (d,), f"{attn}.fn.to_qkv.weight": (3 * inner, d), f"{attn}.fn.to_out.0": (d, inner)}
        shapes |= {f"{ff}.norm": (d,), f"{ff}.fn.net.0": (hidden, d), f"{ff}.fn.net.3": (d, hidden)}
    eb = "transformer.layers.1.1"
    shapes |= {f"{eb}.update.query.0": (28, 2 * d), f"{eb}.update.query.2": (2 * d, 28), f"{eb}.update.value": (d, d)}
    shapes |= {f"{eb}.update.norm": (d,), f"{eb}.to_x.0": (d,), f"{eb}.to_x.1": (14, d), f"{eb}.to_k.0": (d,)}
    shapes |= {f"{eb}.to_k.1": (2 * patches, d), f"{eb}.to_v.1.weight": (d, 14), f"{eb}.to_n.1.weight": (d, 14)}
    shapes |= {"transformer.encoder.to_v": (d, n_genes), "transformer.pool.head": (d, d)}
    shapes |= {"mlp_head.0": (2 * d,), "mlp_head.1": (n_genes, 2 * d)}
    rng, state = np.random.default_rng(3), {}
    for name, shape in shapes.items():
        if name.endswith(("weight", "embedding")):
            state[name] = rng.normal(size=shape) / 3
        else:
            state[f"{name}.weight"] = rng.normal(size=shape) / 3 + (len(shape) == 1)
            state[f"{name}.bias"] = rng.normal(size=shape[0]) / 3
    return state


def slow_egn(state: dict, image, features, exemplars, expression) -> np.ndarray:
    """One tile (3, H, W), (F,), (k, F), (k, G) -> (G,), a vector at a time."""

    def linear(name, x):
        return state[f"{name}.weight"] @ x + state.get(f"{name}.bias", 0)

    def norm(name, x):
        x = (x - x.mean()) / math.sqrt(x.var() + 1e-5)
        return state[f"{name}.weight"] * x + state[f"{name}.bias"]

    def mlp(name, x, first="fn.net.0", second="fn.net.3"):
        x = linear(f"{name}.{first}", norm(f"{name}.norm", x))
        return linear(f"{name}.{second}", x * (1 + erf(x / math.sqrt(2))) / 2)

    def attention(name, tokens):
        triples = [np.split(linear(f"{name}.fn.to_qkv", norm(f"{name}.norm", t)), 3) for t in tokens]
        out = []
        for q, _, _ in triples:
            heads = []
            for part in (slice(h * 5, h * 5 + 5) for h in range(3)):
                weight = softmax([q[part] @ k[part] / math.sqrt(5) for _, k, _ in triples])
                heads.append(sum(w * v[part] for w, (_, _, v) in zip(weight, triples, strict=True)))
            out.append(linear(f"{name}.fn.to_out.0", np.concatenate(heads)))
        return out

    squares = [image[:, y : y + 8, x : x + 8].transpose(1, 2, 0).ravel() for y in (0, 8) for x in (0, 8)]
    position = state["pos_embedding"][0]
    tokens = [linear("to_patch_embedding.1", s) + p for s, p in zip(squares, position, strict=False)]
    views = [linear("transformer.encoder.proq", features)]
    views += [
        linear("transformer.encoder.proe", np.concatenate(both)) for both in zip(exemplars, expression, strict=True)
    ]
    for i in range(2):
        views = [v + mlp(f"transformer.encoder.layers.{i}", v) for v in views]
    window, others = views[0], views[1:]
    given = [linear("transformer.encoder.to_v", y) for y in expression]
    for i in range(2):
        added = attention(f"transformer.layers.{i}.0", [t + p for t, p in zip(tokens, position, strict=False)])
        tokens = [t + a for t, a in zip(tokens, added, strict=True)]
        if i == 1:
            eb, revised = "transformer.layers.1.1", window.copy()
            for view, value in zip(others, given, strict=True):
                x = linear(f"{eb}.update.query.0", np.concatenate([window - view, view]))
                gate = linear(f"{eb}.update.query.2", x * expit(x))[:12]
                revised += expit(gate) * linear(f"{eb}.update.value", value) / len(others)
            gates = expit(linear(f"{eb}.to_k.1", norm(f"{eb}.to_k.0", revised))).reshape(2, 4)
            mixed = [
                linear(f"{eb}.to_x.1", norm(f"{eb}.to_x.0", t)) * np.repeat(gates[:, j], 7)
                for j, t in enumerate(tokens)
            ]
            tokens = [t + linear(f"{eb}.to_v.1", m) for t, m in zip(tokens, mixed, strict=True)]
            window = window + linear(f"{eb}.to_n.1", np.mean(mixed, axis=0))
        tokens = [t + mlp(f"transformer.layers.{i}.2", t) for t in tokens]
    scores = np.array([linear("transformer.pool.head", t) for t in tokens])
    pooled = scores.mean(axis=0) + 0.5 * (softmax(0.1 * scores, axis=0) * scores).sum(axis=0)
    return linear("mlp_head.1", norm("mlp_head.0", np.concatenate([pooled, window])))


RENAMED = {
    "to_patch_embedding.1": "to_patches",
    "transformer.encoder.proq": "projector.window",
    "transformer.encoder.proe": "projector.exemplar",
    "transformer.encoder.to_v": "projector.expression",
    **{
        f"transformer.encoder.layers.{i}.{theirs}": f"projector.shared.{i}.{ours}"
        for i in range(2)
        for theirs, ours in (("norm", 0), ("fn.net.0", 1), ("fn.net.3", 3))
    },
    **{
        f"transformer.layers.{i}.{theirs}": f"blocks.{i}.{ours}"
        for i in range(2)
        for theirs, ours in (
            ("0.norm", "attn_norm"),
            ("0.fn.to_qkv", "to_qkv"),
            ("0.fn.to_out.0", "to_out"),
            ("2.norm", "ff_norm"),
            ("2.fn.net.0", "ff.0"),
            ("2.fn.net.3", "ff.3"),
        )
    },
    **{
        f"transformer.layers.1.1.{theirs}": f"bridges.1.{ours}"
        for theirs, ours in (
            ("update.query", "relate"),
            ("update.value", "value"),
            ("update.norm", "exemplar_norm"),
            ("to_k", "to_gate"),
            ("to_x", "to_heads"),
            ("to_v.1", "to_patches"),
            ("to_n.1", "to_window"),
        )
    },
    "transformer.pool.head": "pool.score",
    "mlp_head": "head",
}


def ours(state: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    renamed = {"position": state["pos_embedding"][0, :-1]}  # theirs has one row that nothing reads
    for key, value in state.items():
        for theirs, name in RENAMED.items():
            if key.startswith(f"{theirs}."):
                renamed[name + key.removeprefix(theirs)] = value
    kernel = renamed["to_patches.weight"]
    renamed["to_patches.weight"] = kernel.reshape(len(kernel), 8, 8, 3).transpose(0, 3, 1, 2)
    return {key: torch.tensor(value) for key, value in renamed.items()}


@torch.no_grad()
def test_output_is_that_of_the_authors_architecture():
    state, rng = authors_state(6, 9), np.random.default_rng(1)
    model = make_model(6, mean=[0, 0, 0], std=[1, 1, 1]).double()
    model.load_state_dict(ours(state))
    inputs = rng.random((2, 3, 16, 16)), rng.normal(size=(2, 9)), rng.normal(size=(2, 4, 9)), rng.random((2, 4, 6))
    expected = np.stack([slow_egn(state, *one) for one in zip(*inputs, strict=True)])
    assert expected.std(axis=0).min() > 1e-2
    np.testing.assert_allclose(model(*map(torch.from_numpy, inputs)), expected, rtol=1e-9)
    for change in (0, 1, 2, 3):  # each input matters
        changed = [x + 0.1 if i == change else x for i, x in enumerate(inputs)]
        assert np.abs(model(*map(torch.from_numpy, changed)).numpy() - expected).max() > 1e-4


@torch.no_grad()
def test_the_papers_residual_starts_from_the_revised_view():
    given, revised = make_model(bridge_residual="given"), make_model(bridge_residual="revised")
    bridge, other = given.bridges["1"], revised.bridges["1"]
    patches, window, exemplars, expression = (torch.randn(2, n, 12) for n in (4, 1, 3, 3))
    x, y = (b(patches, window, exemplars, expression) for b in (bridge, other))
    assert torch.equal(x[0], y[0]) and torch.equal(x[2], y[2])
    related = bridge.relate(torch.cat([window - exemplars, exemplars], dim=2))[..., :12]
    added = (related.sigmoid() * bridge.value(expression)).mean(dim=1, keepdim=True)
    torch.testing.assert_close(y[1] - x[1], added)


@pytest.mark.parametrize("n_kinds", [1000, 4, 2])
def test_exemplars_are_the_nearest_of_another_kind(n_kinds):
    rng = np.random.default_rng(n_kinds)
    features, kind = rng.normal(size=(60, 5)) + 10, rng.integers(0, n_kinds, 60)
    bank, queries = rng.permutation(60)[:40], np.arange(60)
    found = nearest_exemplars(*map(torch.from_numpy, (features, kind, bank, queries)), 6, chunk=7).numpy()
    for query, positions in zip(queries, found, strict=True):
        others = [row for row in bank if kind[row] != kind[query]]
        nearest = sorted(others, key=lambda row: np.linalg.norm(features[row] - features[query]))
        np.testing.assert_array_equal(bank[positions], nearest[:6])


def test_too_few_exemplars_are_said():
    features, kind = torch.randn(5, 2), torch.tensor([0, 0, 1, 1, 1])
    rows = torch.arange(5)
    assert nearest_exemplars(features, kind, rows, rows, 2) is not None
    assert nearest_exemplars(features, kind, rows, rows, 3) is None, "three of kind 1 have two of kind 0"
    assert nearest_exemplars(features, kind, rows, rows, 6) is None


def test_exemplars_come_from_the_training_side_and_from_other_sections(data):
    spots, target = data.spots, torch.from_numpy(data.target[:])
    for apart in ("section", "spot"):
        model = make_model(apart=apart)
        for bank, queries in (
            (("train",), ("train", "validation")),
            (("train", "validation"), ("test",)),
        ):
            model.set_exemplars(data, bank, queries)
            rows, asking = data.rows(*bank), data.rows(*queries)
            chosen = rows[model._exemplars[asking].numpy()]
            name = "section" if apart == "section" else "spot"
            label = spots["section"].to_numpy() if name == "section" else np.arange(len(spots))
            assert not (label[chosen] == label[asking][:, None]).any()
            assert "C" not in set(spots["patient"].to_numpy()[chosen.ravel()]), "the test patient"
            torch.testing.assert_close(model._bank_expression[model._exemplars[asking]], target[chosen])
            untouched = np.setdiff1d(np.arange(len(spots)), asking)
            assert (model._exemplars[untouched] == -1).all()


def test_too_few_exemplars_of_other_patients_are_refused(data):
    wanted = 1 + data.spots["patient"].iloc[data.rows("train")].value_counts().min()
    with pytest.raises(InputError, match=f"fewer than model.n_exemplars={wanted} exemplars of another patient among"):
        make_model(apart="patient", n_exemplars=int(wanted)).set_exemplars(data, ("train",), ("train", "validation"))


def test_correlation_loss_is_that_of_numpy():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 7)), rng.normal(size=(20, 7))
    x[:, 3], y[:, 5] = 2.0, 0.0
    r = [0 if i in (3, 5) else np.corrcoef(x[:, i], y[:, i])[0, 1] for i in range(7)]
    predicted = torch.tensor(x, requires_grad=True)
    loss = correlation_loss(predicted, torch.from_numpy(y))
    assert float(loss.detach()) == pytest.approx(1 - np.mean(r), abs=1e-6)
    loss.backward()
    assert torch.isfinite(predicted.grad).all()
    assert float(correlation_loss(torch.from_numpy(3 * y + 1), torch.from_numpy(y))) == pytest.approx(1 / 7, abs=1e-6)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_overfits_eight_spots(data):
    model = make_model(schedule="none", lr=1e-2)
    model.set_exemplars(data, ("train",), ("train", "validation"))
    batch = data.batch(SpotIndex(torch.from_numpy(data.rows("train")[:8])))
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.param_groups[0]["weight_decay"] == 1e-4
    model.train()
    for _ in range(150):
        optimizer.zero_grad()
        loss = model.training_step(batch, 0)
        loss.backward()
        optimizer.step()
    predicted, target = model.predict(batch).detach(), batch.target
    assert (predicted - target).square().mean() < 0.02 * (target - target.mean(dim=0)).square().mean()
    mse = (predicted - target).square().mean()
    expected = float(mse + 0.5 * correlation_loss(predicted, target))
    assert float(model.training_step(batch, 0).detach()) == pytest.approx(expected, rel=1e-4)


def test_restarts_go_up_for_100_steps_and_down_to_a_fifth():
    rate = [restarts(step, 300) for step in range(300)]
    assert rate[0] == pytest.approx(0.2) and rate[100] == 1.0 and rate[200] == pytest.approx(0.6)
    assert np.all(np.diff(rate[:101]) > 0) and np.all(np.diff(rate[100:]) < 0) and 0.2 < rate[-1] < 0.201


@pytest.mark.parametrize("schedule", ["cosine", "restarts"])
def test_a_schedule_needs_an_end(schedule):
    model = make_model(schedule=schedule)
    model._trainer = SimpleNamespace(estimated_stepping_batches=float("inf"), max_epochs=-1)
    with pytest.raises(InputError, match=f"{schedule} .*trainer.max_epochs"):
        model.configure_optimizers()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile_px": 20}, "model.patch_px=8: tiles have 20 px; a divisor of that would fit"),
        ({"apart": "block"}, "model.apart=block: choose section, patient or spot"),
        ({"schedule": "step"}, "model.schedule=step: choose cosine, restarts or none"),
        ({"bridge_residual": "none"}, "model.bridge_residual=none: choose given or revised"),
        ({"n_exemplars": 0}, "model.n_exemplars=0: a whole number of at least 1 would fit"),
        ({"correlation_weight": -1.0}, "model.correlation_weight=-1.0: a number of at least 0 would fit"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        make_model(**arguments)
