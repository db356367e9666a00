"""The dry run of a method: every way to be broken is caught and named, and what is not broken passes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from stexp import construct
from stexp.cli.check import little_data
from stexp.config import to_plain
from stexp.config.compose import compose
from stexp.data.splits import check_fold
from stexp.files import CONF
from stexp.training.dry_run import Point, dry_run

METHODS = '''
import torch
import pytorch_lightning as pl
from torch import nn
from stexp.models.closed_form import ClosedForm
from stexp.models.method import Method, Prediction


class Right(Method):
    def __init__(self, n_genes, lr=1e-3):
        super().__init__()
        self.head, self.lr = nn.Linear(3, n_genes), lr

    def forward(self, batch):
        return self.head(batch.image.mean(dim=(2, 3)))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch), batch.target)

    def predict_step(self, batch, batch_idx=0):
        return Prediction(self(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Plain(pl.LightningModule):
    __init__, forward = Right.__init__, Right.forward
    training_step, configure_optimizers = Right.training_step, Right.configure_optimizers

    def predict_step(self, batch):
        return self(batch)


# super() of the copied __init__ is that of Right
def _init(self, n_genes, lr=1e-3):
    pl.LightningModule.__init__(self)
    self.head, self.lr = nn.Linear(3, n_genes), lr


Plain.__init__ = _init


class WithoutHooks(Method):
    def __init__(self, n_genes):
        super().__init__()

    def training_step(self, batch, batch_idx):
        return None


class NotBuilt(Right):
    def __init__(self, n_genes):
        raise RuntimeError("no such layer")


class WrongShape(Right):
    def predict_step(self, batch, batch_idx=0):
        return Prediction(self(batch).T)


class Nothing(Right):
    def predict_step(self, batch, batch_idx=0):
        self(batch)


class NotFinite(Right):
    def training_step(self, batch, batch_idx):
        return (self(batch) - batch.target).square().mean() / 0


class PredictsNan(Right):
    def predict_step(self, batch, batch_idx=0):
        return Prediction(self(batch) * float("nan"))


class LossPerSpot(Right):
    def training_step(self, batch, batch_idx):
        return (self(batch) - batch.target).square().mean(dim=1)


class NoLoss(Right):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)


class Unreached(Right):
    def __init__(self, n_genes):
        super().__init__(n_genes)
        self.forgotten = nn.Linear(3, 3)


class Detached(Right):
    def forward(self, batch):
        return self.head(batch.image.mean(dim=(2, 3))) + self.shift.detach()

    def __init__(self, n_genes):
        super().__init__(n_genes)
        self.shift = nn.Parameter(torch.zeros(n_genes))


class NotOptimised(Right):
    def __init__(self, n_genes):
        super().__init__(n_genes)
        self.scale = nn.Parameter(torch.ones(n_genes))

    def forward(self, batch):
        return self.scale * super().forward(batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.head.parameters())


class DependsOnBatch(Right):
    def forward(self, batch):
        colour = batch.image.mean(dim=(2, 3))
        return self.head(colour - colour.mean(dim=0))


class Draws(Right):
    def predict_step(self, batch, batch_idx=0):
        made = self(batch)
        return Prediction(made + torch.randn_like(made))


class TrainsWhilePredicting(Right):
    def __init__(self, n_genes):
        super().__init__(n_genes)
        self.drop = nn.Dropout(0.5)

    def predict_step(self, batch, batch_idx=0):
        self.drop.train()
        return Prediction(self.drop(self(batch)))


class ForgetsState(Right):
    def on_fit_start(self):
        self.mean = torch.tensor(self.data.target.mean(axis=0))

    def forward(self, batch):
        return super().forward(batch) + getattr(self, "mean", 0)


class SeesTruth(Right):
    def predict_step(self, batch, batch_idx=0):
        return Prediction(0.5 * self(batch) + 0.5 * batch.target)


class PeeksAtData(Right):
    def predict_step(self, batch, batch_idx=0):
        truth = torch.from_numpy(self.data.target[batch.spot.numpy()])
        return Prediction(0.5 * self(batch) + 0.5 * truth)


class PeeksBefore(Right):
    """It learns where to add what from the held-out spots before it predicts them."""

    def on_predict_start(self):
        self.offset = torch.tensor(self.data.expression[self.data.rows("test")].mean(axis=0))

    def predict_step(self, batch, batch_idx=0):
        return Prediction(self(batch) + self.offset)


class Raises(Right):
    def predict_step(self, batch, batch_idx=0):
        return Prediction(self.head(batch.image.mean(dim=(2, 3))[:, :2]))


class ValidatesOtherwise(Right):
    def validation_step(self, batch, batch_idx):
        return 0.5


class StaysOpen(Right):
    """It says that frozen features are all it reads, and reads tiles."""

    def __init__(self, image_encoder, n_genes):
        super().__init__(n_genes)
        self.image_encoder = image_encoder
        self.wide = nn.Linear(image_encoder.num_features, n_genes)

    @property
    def frozen_encoder(self):
        return self.image_encoder if self.image_encoder.frozen else None

    def forward(self, batch):
        return self.wide(self.image_encoder(batch.image)) + super().forward(batch)


class AtOnce(ClosedForm):
    def __init__(self, n_genes):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_genes))

    def fit_to(self, data):
        self.mean.copy_(torch.tensor(data.target[data.rows("train")].mean(axis=0)))

    def predict_step(self, batch, batch_idx=0):
        return Prediction(self.mean.repeat(len(batch), 1))
'''

BROKEN = {
    "WithoutHooks": ("hooks", "configure_optimizers, predict_step"),
    "NotBuilt": ("build", "no such layer"),
    "WrongShape": ("prediction", "genes, .* would fit"),
    "Nothing": ("prediction", "NoneType"),
    "NotFinite": ("loss", "not finite"),
    "PredictsNan": ("prediction", "not finite"),
    "LossPerSpot": ("loss", "shape"),
    "NoLoss": ("loss", "ClosedForm"),
    "Unreached": ("gradients", "none reaches forgotten.weight, forgotten.bias"),
    "Detached": ("gradients", "none reaches shift"),
    "NotOptimised": ("gradients", "no optimizer has scale"),
    "DependsOnBatch": ("batches", "averaged over the batch"),
    "Draws": ("repeats", "predicted twice"),
    "TrainsWhilePredicting": ("evaluation mode", "drop is in training mode"),
    "ForgetsState": ("reload", "register_buffer"),
    "SeesTruth": ("truth", "measured expression"),
    "PeeksAtData": ("truth", "self.data"),
    "PeeksBefore": ("truth", "self.data"),
    "Raises": ("predict", r"broken_methods\.py:\d+, predict_step"),
    "ValidatesOtherwise": ("validation", "float"),
    "StaysOpen": ("freeze", r"broken_methods\.py"),
}
"""Class -> the point that it fails, and what is said."""


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    """The module of these methods, as a plug-in."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "broken_methods.py").write_text(METHODS)
    sys.path.insert(0, str(folder))
    construct.allow("broken_methods")
    yield "broken_methods"
    construct._allowed.pop("broken_methods")
    sys.path.remove(str(folder))
    sys.modules.pop("broken_methods", None)


@pytest.fixture(scope="module")
def config() -> dict:
    return to_plain(compose("check", []))


@pytest.fixture(scope="module")
def data(config, tmp_path_factory):
    return little_data(config, tmp_path_factory.mktemp("little"))


def points(methods: str, name: str, data, folder: Path, **arguments) -> dict[str, Point]:
    return {point.name: point for point in dry_run({"_target_": f"{methods}.{name}", **arguments}, data, folder)}


@pytest.mark.parametrize("name", BROKEN)
def test_each_way_to_be_broken_is_caught(name, methods, data, config, tmp_path):
    arguments = {"image_encoder": config["image_encoder"]} if name == "StaysOpen" else {}
    made = points(methods, name, data, tmp_path, **arguments)
    point, text = BROKEN[name]
    assert made[point].fits is False
    assert re.search(text, made[point].text), made[point].text
    also = {"Draws": {"reload", "batches", "truth"}, "TrainsWhilePredicting": {"repeats", "batches", "truth", "reload"}}
    wrong = {key for key, each in made.items() if each.fits is False}
    assert wrong - also.get(name, set()) - {"train"} == {point}


@pytest.mark.parametrize("name", ["Right", "Plain", "AtOnce"])
def test_what_is_not_broken_passes(name, methods, data, tmp_path):
    made = points(methods, name, data, tmp_path)
    assert [str(point) for point in made.values() if point.fits is False] == []
    assert {"build", "loss", "validation", "prediction", "repeats", "batches", "truth", "reload"} <= set(made)


SMALL = {
    "deepspot": ["model.dim=16"],
    "egn": ["model.dim=64", "model.depth=2"],
    "hist2st": ["model.channels=16", "model.n_views=1", "model.depth=1", "model.heads=2", "model.mixer_depth=1"],
    "histogene": ["model.dim=32", "model.depth=1", "model.heads=2", "model.hidden=16"],
    "m2ort": ["model.dim=24", "model.depth=1", "model.heads=2", "model.hidden=16"],
    "sepal": ["model.image_epochs=2"],
    "stflow": ["model.dim=16", "model.depth=1"],
    "thitogene": ["model.depth=1", "model.heads=2", "model.hidden=64", "model.graph_hidden=32", "model.graph_dim=64"],
    "triplex": [
        *("model.dim=64", "model.global_depth=1", "model.neighbour_depth=1"),
        *(f"model.{name}=64" for name in ("fusion_hidden", "global_hidden", "neighbour_hidden")),
    ],
}
"""What makes a step of the larger methods one of a second; nothing here lets a point pass."""
SLOW = SMALL.keys()


def methods_of_ours() -> list[str]:
    return sorted(path.stem for path in (CONF / "model").glob("*.yaml"))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in methods_of_ours()],
)
def test_every_method_of_ours_passes(name, data, tmp_path):
    node = to_plain(compose("check", [f"model={name}", *SMALL.get(name, [])]))["model"]
    node = {key: value for key, value in node.items() if key != "name"}
    assert [str(point) for point in dry_run(node, data, tmp_path) if point.fits is False] == []


@pytest.mark.parametrize("protocol", ["strict", "paper", "blocks"])
def test_a_fold_of_every_protocol_is_held_out(protocol: str, tmp_path: Path) -> None:
    data = little_data(to_plain(compose("check", [f"protocol={protocol}"])), tmp_path)
    check_fold(data.sections, data.protocol, data.fold)
    assert len(data.rows("train")) and len(data.rows("test"))
