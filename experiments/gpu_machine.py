"""What experiments/gpu.py needs of a machine: ``python experiments/gpu_machine.py`` imports all of it, and says what
lacks; with a folder, it writes a tiny HER2+ and an untrained encoder there, for a dry run."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path

MODULES = (
    "anndata", "h5py", "huggingface_hub", "hydra", "imagecodecs", "jinja2", "matplotlib", "numpy", "omegaconf",
    "openslide", "pandas", "PIL", "pydantic", "pytorch_lightning", "rich", "safetensors", "scipy", "sklearn",
    "pyarrow", "tifffile", "timm", "torch", "torchmetrics", "torchvision",
    "stexp.cli.train", "stexp.api.train", "stexp.models.retrieval", "stexp.data.slides.stream",
)  # fmt: skip
"""What the measured commands import; the last are ours, which say what else they lack."""
NOT_CALLED = ("pooch", "scanpy", "wandb")
"""Of our dependencies, those that these do without: they download nothing, choose no genes, log to no server."""
SECTIONS = ("B4", "C2", "C3", "C5", "C6")
"""Those of HER2+ whose images are public with the counts."""
N_GENES, PITCH_PX, SIDE = 40, 100, 4


def source_digest() -> str:
    """Hash of all that runs here; tells whether the code of a pack is the code beside it."""
    top, whole = Path(__file__).resolve().parents[1], hashlib.sha256()
    for pattern in ("src/stexp/**/*.py", "conf/**/*.yaml", "experiments/*.py", "experiments/*.sh"):
        for path in sorted(top.glob(pattern)):
            whole.update(f"{path.relative_to(top).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return whole.hexdigest()


def missing() -> dict[str, str]:
    """Module -> why it could not be imported."""
    reasons = {}
    for name in MODULES:
        try:
            importlib.import_module(name)
        except Exception as error:  # of whatever the machine has: all are reported at once
            reasons[name] = f"{type(error).__name__}: {error}"
    return reasons


def write_dry(folder: Path) -> None:
    """Five sections of 16 spots laid out as HER2+, their gene list, and DenseNet-121 with random weights."""
    import numpy as np
    import pandas as pd
    from PIL import Image

    genes = [f"GENE{i:02}" for i in range(N_GENES)]
    rng, root = np.random.default_rng(0), folder / "her2st"
    (folder / "gene_lists").mkdir(parents=True)
    (folder / "gene_lists" / "her2st_785.txt").write_text("\n".join(genes) + "\n")
    x, y = (n.ravel() for n in np.mgrid[1 : SIDE + 1, 1 : SIDE + 1])
    spots = pd.DataFrame({"x": x, "y": y, "new_x": x, "new_y": y, "pixel_x": x * PITCH_PX, "pixel_y": y * PITCH_PX})
    names = [f"{i}x{j}" for i, j in zip(x, y, strict=True)]
    for section in SECTIONS:
        for place in ("ST-cnts", "ST-spotfiles", f"ST-imgs/{section[0]}/{section}"):
            (root / place).mkdir(parents=True, exist_ok=True)
        counts = pd.DataFrame(rng.negative_binomial(2, 0.1, (len(names), N_GENES)), index=names, columns=genes)
        counts.to_csv(root / "ST-cnts" / f"{section}.tsv.gz", sep="\t")
        spots.assign(selected=1).to_csv(root / "ST-spotfiles" / f"{section}_selection.tsv", sep="\t", index=False)
        pixels = rng.integers(90, 255, ((SIDE + 1) * PITCH_PX, (SIDE + 1) * PITCH_PX, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"ST-imgs/{section[0]}/{section}/{section}.jpg")
    import timm

    write_half(timm.create_model("densenet121").state_dict(), folder / "densenet121.safetensors")


def write_half(state: dict, path: Path) -> None:
    """Weights rounded to float16, half the size; whoever loads them gets float32 again."""
    from safetensors.torch import save_file

    save_file({key: value.half() if value.is_floating_point() else value for key, value in state.items()}, path)


def main(arguments: list[str]) -> None:
    reasons = missing()
    if reasons:
        print(json.dumps({"missing": reasons}))
        return
    if arguments:
        write_dry(Path(arguments[0]))
    import torch

    from stexp import hardware
    from stexp.runs.provenance import git_state, versions

    facts = {**hardware.describe(), "cuda": torch.version.cuda, "versions": versions(), **git_state()}
    if torch.cuda.is_available():
        facts["gpu_memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
    print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1:])
