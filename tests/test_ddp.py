"""Several devices take the steps of one: two CPU processes under torchrun against one, and the order of their spots."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pytest
import torch
from ddp_worker import METHODS, gradients
from demo_run import configure, overrides_of, run
from torch import nn

from stexp import config
from stexp.data.batches import ShuffledBatches
from stexp.errors import InputError
from stexp.evaluation.records import read_json
from stexp.models.encoders.image import ImageEncoder
from stexp.models.gather import gather
from stexp.models.mean import Mean
from stexp.training import callbacks
from stexp.training.distributed import SyncBatchNorm, check_several_devices
from stexp.training.machine import Machine

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def two_processes(arguments: list[str]) -> None:
    done = subprocess.run([*TORCHRUN, *arguments], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def two_machines(arguments: list[str]) -> None:
    """One process on each, both of them this one; they meet at a port that is free."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    meet = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    command = [sys.executable, "-m", "torch.distributed.run", *meet, *arguments]
    machines = [subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [machine.communicate()[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors[0][-3000:]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def both(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """Loss and gradients of one process, and of the first of two."""
    alone = gradients(demo, 0, 1)  # also makes what the other processes read
    path = tmp_path_factory.mktemp("ddp") / "gradients.pt"
    two_processes([str(HERE / "ddp_worker.py"), str(demo), str(path)])
    return alone, torch.load(path, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_have_the_gradients_of_one(both: tuple[dict, dict], method: str) -> None:
    alone, together = (gradient[method] for gradient in both)
    assert set(alone) == set(together)
    assert {key.split(".")[0] for key in alone} >= {"image_encoder", "image_projection", "spot_projection", "loss"}
    for key, expected in alone.items():
        scale = max(1.0, float(expected.abs().max()))
        assert float((together[key] - expected).abs().max()) <= 1e-6 * scale, key
    if method == "memory":
        assert sorted(alone["negatives.rows"].tolist()) == sorted(set(alone["negatives.rows"].tolist()) - {-1})
    # a device that saw only its own negatives would find log(7) where all are alike
    assert float(alone["loss"]) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("started_by", ["two machines", "lightning"])
def test_a_run_on_two_devices_goes_on_as_one_would(demo: Path, tmp_path: Path, monkeypatch, started_by: str) -> None:
    """From the first epoch of one device; the encoder frozen and tiles as they are, so that nothing is drawn."""
    same = ["image_encoder.frozen=true", "data.augmentation=none", "hardware.precision=32-true", "data.batch_size=50"]
    one, two = tmp_path / "one", tmp_path / "two"

    def keep(self, trainer, model) -> None:
        if trainer.current_epoch == 1:
            shutil.copytree(one / "checkpoints", two / "checkpoints")
            shutil.copy(one / "config.yaml", two / "config.yaml")

    two.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.EpochLines, "on_train_epoch_start", keep)
        expected = run(demo, one, *same, fold="A")["scores"]
    text = (two / "config.yaml").read_text()
    devices, machines = (1, 2) if started_by == "two machines" else (2, 1)
    several = f"devices: {devices}\n  num_nodes: {machines}\n  strategy: ddp\n  sync_batchnorm: false"
    (two / "config.yaml").write_text(text.replace("devices: 1", several))
    arguments = ["-m", "stexp.train", *overrides_of(demo, two), *same, "trainer=ddp", "trainer.accelerator=cpu"]
    arguments += [f"trainer.devices={devices}", f"trainer.num_nodes={machines}", "fold=A"]
    if started_by == "two machines":
        two_machines(arguments)
    else:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    scores = read_json(two / "metrics.json")["scores"]
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
    data = config.dataset_of(cfg).serve(config.dataset_of(cfg).read_sections(protocol), protocol, "A", cfg.seed)
    seen = []
    for rank in range(3):
        data.trainer = SimpleNamespace(
            global_rank=rank, world_size=3, lightning_module=SimpleNamespace(batching="spots")
        )
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
        ({"devices": 2, "strategy": "fsdp"}, "fsdp.*choose auto, ddp"),
        ({"devices": 2, "strategy": "ddpp"}, "did you mean ddp"),
        ({"devices": 2, "num_nodes": 0}, "num_nodes=0"),
        ({"devices": "two"}, "devices=two"),
        ({"devices": 0}, "at least 1"),
        ({"devices": 2, "sync_batchnorm": True}, "needs GPUs"),
    ],
)
def test_devices_that_are_not_there_are_refused(trainer: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        _ = Machine({"accelerator": "cpu", **trainer}).devices


def test_devices_of_all_machines_train_together() -> None:
    assert Machine({"accelerator": "cpu", "devices": 2, "num_nodes": 3}).world_size == 6


def test_what_cannot_train_on_several_devices_is_refused() -> None:
    def data(batch: int, train: int, validation: int) -> SimpleNamespace:
        return SimpleNamespace(batch_size=batch, rows=lambda role: range({"train": train}.get(role, validation)))

    method = SimpleNamespace(several_devices=True)
    check_several_devices(Mean(3), data(2, 2, 1), 1)
    check_several_devices(method, data(4, 4, 0), 2)
    with pytest.raises(InputError, match=r"Mean trains on one device; take trainer\.devices=1"):
        check_several_devices(Mean(3), data(64, 64, 64), 2)
    for sizes, says in (((3, 9, 9), "batch_size: 3"), ((9, 3, 9), "training spots: 3"), ((9, 9, 1), "validation")):
        with pytest.raises(InputError, match=rf"{says}.* too few for 2 devices"):
            check_several_devices(method, data(*sizes), 2)
