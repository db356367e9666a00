"""Loss and gradients of one training step of each method that trains on several devices; a script for torchrun."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from demo_run import configure
from torch import nn

from stexp import config
from stexp.data.batches import SpotIndex, part_of
from stexp.models.bleep import BLEEP
from stexp.models.encoders.image import ImageEncoder
from stexp.models.heclip import HECLIP
from stexp.models.mclstexp import MclSTExp

SPOTS = 13  # over two devices 7 and 6
METHODS = {
    "neighbours": (MclSTExp, {"n_positions": 60, "learn_temperature": True, "temperature": 20.0}),
    "batch": (MclSTExp, {"n_positions": 60, "spot_context": "batch", "image_weight": 0.3}),
    "bleep": (BLEEP, {"dropout": 0.0, "temperature": 3.0}),
    "memory": (
        BLEEP,
        {"dropout": 0.0, "objective": "jsd", "normalise": True, "negatives_memory": 9, "mask_within_um": 250.0},
    ),
    "heclip": (HECLIP, {"dropout": 0.0, "variant": "heg"}),
}


class Step(nn.Module):
    """A training step as the forward of a module, which data-parallel training wraps."""

    def __init__(self, method: nn.Module) -> None:
        super().__init__()
        self.method = method

    def forward(self, batch) -> torch.Tensor:
        return self.method.training_step(batch, 0)


def gradients(root: Path, rank: int, world: int) -> dict[str, dict[str, torch.Tensor]]:
    """Of one step on a device's part of one batch, without dropout and batch statistics."""
    torch.set_num_threads(1)
    cfg = configure(root, root / "unused")
    protocol = config.build(cfg.protocol)
    data = config.dataset_of(cfg).serve(config.dataset_of(cfg).read_sections(protocol), protocol, "A", cfg.seed)
    rows = torch.from_numpy(data.rows("train")[:SPOTS])
    batch = data.batch(SpotIndex(rows[part_of(SPOTS, rank, world)], whole=SPOTS))
    out = {}
    for name, (method, settings) in METHODS.items():
        torch.manual_seed(0)
        model = method(ImageEncoder("test_resnet", pretrained=False), len(data.panel), embedding_dim=16, **settings)
        step = Step(model.eval())
        step = nn.parallel.DistributedDataParallel(step) if world > 1 else step
        if name == "memory":
            with torch.no_grad():
                step(batch)  # fills it
        loss = step(batch)
        loss.backward()
        out[name] = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
        out[name]["loss"] = loss.detach()
        out[name] |= {key: value for key, value in model.named_buffers() if key.startswith("negatives.")}
    return out


if __name__ == "__main__":
    dist.init_process_group("gloo")
    computed = gradients(Path(sys.argv[1]), dist.get_rank(), dist.get_world_size())
    if os.environ["RANK"] == "0":
        torch.save(computed, sys.argv[2])
    dist.barrier()
    dist.destroy_process_group()
