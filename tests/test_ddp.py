"""Several devices take the steps of one: two CPU processes against one process, and the order of what they see."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pytest
import torch
import torch.distributed as dist
from demo_run import configure, run
from torch import nn

from stexp import config
from stexp.cli.train import claim, train
from stexp.data.batches import ShuffledBatches, SpotIndex, part_of
from stexp.errors import InputError
from stexp.evaluation.predictions import read_json
from stexp.models.bleep import BLEEP
from stexp.models.encoders.image import ImageEncoder
from stexp.models.mclstexp import MclSTExp
from stexp.models.mean import Mean
from stexp.training import callbacks
from stexp.training.distributed import Ranks, SyncBatchNorm, check, devices_of, find_free_network_port, gather, others

SPOTS = 13  # over two devices 7 and 6
SETTINGS = {
    "neighbours": (MclSTExp, {"n_positions": 60, "learn_temperature": True, "temperature": 20.0}),
    "batch": (MclSTExp, {"n_positions": 60, "spot_context": "batch", "image_weight": 0.3}),
    "bleep": (BLEEP, {"dropout": 0.0, "temperature": 3.0}),
}


class Step(nn.Module):
    """A training step as the forward of a module, which data-parallel training wraps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch) -> torch.Tensor:
        return self.model.training_step(batch, 0)


def gradients(root: str, rank: int, world: int) -> dict[str, dict[str, torch.Tensor]]:
    """Loss and gradients of one step of each method on its part of one batch, without dropout and batch statistics."""
    torch.set_num_threads(1)
    cfg = configure(Path(root), Path(root) / "unused")
    protocol = config.build(cfg.protocol)
    data = config.build_data(cfg, config.load_sections(cfg, protocol), protocol, "A")
    rows = torch.from_numpy(data.rows("train")[:SPOTS])
    batch = data.batch(SpotIndex(rows[part_of(SPOTS, rank, world)], whole=SPOTS))
    found = {}
    for name, (method, settings) in SETTINGS.items():
        torch.manual_seed(0)
        model = method(ImageEncoder("test_resnet", pretrained=False), len(data.panel), embedding_dim=16, **settings)
        step = Step(model.eval())
        step = nn.parallel.DistributedDataParallel(step) if world > 1 else step
        loss = step(batch)
        loss.backward()
        found[name] = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
        found[name]["loss"] = loss.detach()
    return found


def join(root: str, port: str, rank: int) -> dict[str, dict[str, torch.Tensor]]:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        return gradients(root, rank, 2)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(demo: Path) -> tuple[dict, dict]:
    """What one process finds, and the first of two."""
    alone = gradients(str(demo), 0, 1)  # also makes what the other process reads
    port = str(find_free_network_port())
    command = "import sys, test_ddp; test_ddp.join(*sys.argv[1:], rank=1)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    other = subprocess.Popen([sys.executable, "-c", command, str(demo), port], env=environment)
    try:
        together = join(str(demo), port, 0)
        assert other.wait(60) == 0
    finally:
        other.kill()
    return alone, together


@pytest.mark.parametrize("method", SETTINGS)
def test_two_processes_have_the_gradients_of_one(both: tuple[dict, dict], method: str) -> None:
    alone, together = (found[method] for found in both)
    assert set(alone) == set(together)
    assert {key.split(".")[0] for key in alone} >= {"image_encoder", "image_projection", "spot_projection", "loss"}
    for key, expected in alone.items():
        scale = max(1.0, float(expected.abs().max()))
        assert float((together[key] - expected).abs().max()) <= 1e-6 * scale, key
    # a device that saw only its own negatives would find log(7) where all are alike
    assert float(alone["loss"]) > 0.1


@pytest.mark.slow
def test_a_run_on_two_devices_goes_on_as_one_would(demo: Path, tmp_path: Path, monkeypatch) -> None:
    """From the first epoch of one device; the encoder frozen and tiles as they are, so that nothing is drawn."""
    same = ["image_encoder.frozen=true", "data.augmentation=none", "hardware.precision=32-true", "data.batch_size=50"]
    one, two = tmp_path / "one", tmp_path / "two"
    cfg = configure(demo, two, *same, "trainer=ddp", "trainer.devices=2", "fold=A")
    two.mkdir()
    claim(two, cfg)

    def keep(self, trainer, model) -> None:
        if trainer.current_epoch == 1:
            shutil.copytree(one / "checkpoints", two / "checkpoints")

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.EpochLines, "on_train_epoch_start", keep)
        expected = run(demo, one, *same, fold="A")["scores"]
    scores = train(cfg, config.load_sections(cfg, config.build(cfg.protocol)), "A", two)["scores"]
    assert not dist.is_initialized()

    ours, theirs = (ad.read_h5ad(folder / "predictions.h5ad") for folder in (two, one))
    assert ours.obs_names.is_unique and list(ours.obs_names) == list(theirs.obs_names)
    np.testing.assert_allclose(ours.layers["predicted"], theirs.layers["predicted"], rtol=1e-3, atol=1e-3)
    assert scores["pearson_acg"] == pytest.approx(expected["pearson_acg"], abs=2e-3)
    for name in ("best", "last"):
        a, b = (torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True) for folder in (two, one))
        assert (a["epoch"], a["global_step"]) == (b["epoch"], b["global_step"])
        torch.testing.assert_close(a["state_dict"], b["state_dict"], rtol=1e-3, atol=1e-4)
    assert torch.load(two / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 1
    provenance = read_json(two / "provenance.json")
    assert provenance["hardware"]["devices"] == 2 and provenance["epochs"] == 2


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [16, 17, 39, 40, 64])
def test_the_parts_of_all_devices_are_the_batches_of_one(n: int, world: int) -> None:
    rows = np.random.default_rng(n).permutation(1000)[:n]
    batches = [ShuffledBatches(rows, 20, seed=3, share=(rank, world)) for rank in range(world)]
    for epoch in (0, 5):
        for batch in batches:
            batch.set_epoch(epoch)
        steps = list(zip(*batches, strict=True))  # as many on each
        assert len(steps) == len(batches[0])
        for parts in steps:
            sizes = [len(part.rows) for part in parts]
            assert min(sizes) >= 2 and max(sizes) - min(sizes) <= 1
            assert {part.whole for part in parts} == {sum(sizes)}
            assert len({part.seed for part in parts}) == world
        order = torch.cat([part.rows for parts in steps for part in parts])
        assert sorted(order.tolist()) == sorted(rows)
        one = ShuffledBatches(rows, 20, seed=3)
        one.set_epoch(epoch)
        assert torch.equal(order, torch.cat([batch.rows for batch in one]))


def test_validation_spots_are_split_and_all_else_is_whole(demo: Path) -> None:
    cfg = configure(demo, demo / "unused", "data.eval_batch_size=20")
    protocol = config.build(cfg.protocol)
    data = config.build_data(cfg, config.load_sections(cfg, protocol), protocol, "A")
    seen = []
    for rank in range(3):
        data.share = (rank, 3)
        seen += [index.rows for index in data.val_dataloader()]
        assert sum(len(index.rows) for index in data.predict_dataloader()) == len(data.rows("test"))
    assert torch.cat(seen).tolist() == data.rows("validation").tolist()


def test_one_device_gathers_nothing() -> None:
    x = torch.ones(3, 2)
    assert gather(x, 3) is x


def test_synchronised_batch_norm_keeps_timm_activations_and_weights() -> None:
    encoder = ImageEncoder("test_resnet", pretrained=False).eval()
    image = torch.rand(2, 3, 64, 64)
    expected, names = encoder(image), list(encoder.state_dict())
    converted = SyncBatchNorm().apply(encoder)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
    torch.testing.assert_close(SyncBatchNorm().revert(converted)(image), expected)
    assert list(converted.state_dict()) == names


@pytest.mark.parametrize(
    ("trainer", "says"),
    [
        ({"devices": 2, "strategy": "fsdp"}, "strategy=fsdp: choose auto, ddp"),
        ({"devices": 2, "num_nodes": 2}, "devices of one machine"),
        ({"devices": "two"}, "devices=two"),
        ({"devices": 0}, "at least 1"),
        ({"devices": 2, "sync_batchnorm": True}, "needs GPUs"),
    ],
)
def test_devices_that_are_not_there_are_refused(trainer: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        devices_of(trainer, "cpu")


def test_what_cannot_train_on_several_devices_is_refused() -> None:
    def data(batch: int, train: int, validation: int) -> SimpleNamespace:
        return SimpleNamespace(batch_size=batch, rows=lambda role: range({"train": train}.get(role, validation)))

    model = SimpleNamespace(several_devices=True)
    check(Mean(3), data(2, 2, 1), 1)
    check(model, data(4, 4, 0), 2)
    with pytest.raises(InputError, match=r"Mean trains on one device; take trainer\.devices=1"):
        check(Mean(3), data(64, 64, 64), 2)
    for given, says in (((3, 9, 9), "batch_size: 3"), ((9, 3, 9), "training spots: 3"), ((9, 9, 1), "validation")):
        with pytest.raises(InputError, match=rf"{says}.* too few for 2 devices"):
            check(model, data(*given), 2)


@pytest.mark.parametrize(("status", "error"), [(9, InputError), (0, RuntimeError)])
def test_a_lost_process_is_one_line_and_other_errors_stay(
    tmp_path: Path, monkeypatch, status: int, error: type
) -> None:
    start = subprocess.Popen
    child = [sys.executable, "-c", f"raise SystemExit({status})"]
    monkeypatch.setattr(subprocess, "Popen", lambda command, **given: start(child, **given))
    with pytest.raises(error) as caught, others(tmp_path, Ranks(0, 2)):
        raise RuntimeError("connection closed by peer")
    assert str(caught.value) == (
        "the process of device 1 ended with status 9; the same command goes on from the last checkpoint"
        if status
        else "connection closed by peer"
    )
