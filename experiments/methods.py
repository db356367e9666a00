"""Write the tables of methods and image encoders into conf/README.md.

python experiments/methods.py

Parameters are counted on models built as the configs say; seconds come from the results that are kept.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from stexp import config, files

HERE = Path(__file__).parent
PAGE = HERE.parent / "conf" / "README.md"
N_GENES, N_POSITIONS = 785, 64  # HER2+, and the rows of the published position tables

METHODS = {
    "mclstexp": (
        "Min et al. 2024, [arXiv 2407.08216](https://arxiv.org/abs/2407.08216)",
        "InfoNCE",
        "context of a spot: its 6 nearest spots, not its batch (`spot_context=batch`: published)",
    ),
    "mclstexp_plus": (
        "this project, from `mclstexp`",
        "InfoNCE, then a residual",
        "normalised embeddings at temperature 0.1, neither positions nor attention over spots, corrected, rate 1e-3",
    ),
    "bleep": (
        "Xie et al. 2023, [arXiv 2306.01859](https://arxiv.org/abs/2306.01859)",
        "cross entropy with soft targets",
        "genes of the protocol's panel, not 3,467 variable ones; their other weighting of neighbours is left out",
    ),
    "heclip": (
        "QSong-github/HECLIP, [arXiv 2501.14948](https://arxiv.org/abs/2501.14948)",
        "cross entropy with soft targets of the tiles, one direction",
        "any panel with either variant; no Harmony; validation spots pick the epoch, not the section that is predicted",
    ),
    "stgchb": (
        "after the abstract of Chi et al. 2024, [arXiv 2406.12229](https://arxiv.org/abs/2406.12229)",
        "InfoNCE across and in each modality, HSIC bottleneck",
        "graph, encoders, views, weights and settings are not public: ours",
    ),
    "stnet": (
        "He et al. 2020, [doi 10.1038/s41551-020-0578-x](https://doi.org/10.1038/s41551-020-0578-x)",
        "MSE, summed over genes",
        "genes of the protocol's panel, not the 250 of highest mean",
    ),
    "histogene": (
        "Pang et al. 2021, [bioRxiv 2021.11.28.470212](https://doi.org/10.1101/2021.11.28.470212)",
        "MSE",
        "position tables with as many rows as the array has",
    ),
    "hist2st": (
        "Zeng et al. 2022, [doi 10.1093/bib/bbac297](https://doi.org/10.1093/bib/bbac297)",
        "MSE + 0.25 ZINB + 0.5 distillation",
        "neighbour lists, no N x N matrix; a spot without neighbours looks at itself (theirs divides by 0)",
    ),
    "thitogene": (
        "Jia et al. 2024, [doi 10.1093/bib/bbad464](https://doi.org/10.1093/bib/bbad464)",
        "MSE",
        "graph attention on neighbour lists; tiles of any size from 44 px that 4 divides",
    ),
    "triplex": (
        "Chung et al. 2024, [arXiv 2403.07592](https://arxiv.org/abs/2403.07592)",
        "MSE of the fused head, and of three heads against truth and the fused one",
        "ImageNet ResNet-18, not that of Ciga et al.; truth is not smoothed; dropout is off when predicting",
    ),
    "egn": (
        "Yang et al. 2023, [arXiv 2210.16721](https://arxiv.org/abs/2210.16721)",
        "MSE + 0.5 (1 - Pearson)",
        "exemplars by the frozen encoder (the paper's StyleGAN extractor is not public)",
    ),
    "sepal": (
        "Mejia et al. 2023, [arXiv 2309.01036](https://arxiv.org/abs/2309.01036)",
        "MSE of the difference from the training mean, tiles first, then the graph",
        "no batch correction, median filter or choice of genes by Moran's I",
    ),
    "deepspot": (
        "Nonchev et al. 2025, [doi 10.1101/2025.02.09.25321567](https://doi.org/10.1101/2025.02.09.25321567)",
        "MSE of standardised expression",
        "6 neighbours on a hexagonal array, absent ones do not count; spots are drawn evenly, not by clusters",
    ),
    "m2ort": (
        "Wang et al. 2024, [arXiv 2401.10608](https://arxiv.org/abs/2401.10608)",
        "MSE",
        "tiles of any size that a patch divides; turned by right angles, not by any; expression of the protocol",
    ),
    "stflow": (
        "Huang et al. 2025, [arXiv 2506.05361](https://arxiv.org/abs/2506.05361)",
        "MSE of the end of a flow, at a random time",
        "whole sections train, not windows of them; places in spacings of the array; regular arrays have frames, too",
    ),
    "hest_ridge": (
        "Jaume et al. 2024, [arXiv 2406.16192](https://arxiv.org/abs/2406.16192)",
        "ridge, closed form",
        "256 principal components as published, or fewer where there are fewer spots",
    ),
    "consensus": (
        "this project",
        "ridges and neighbours at three scales, low rank, closed form",
        "a tile is read at three scales; what is open is chosen on training spots left out in turn",
    ),
    "mean": ("", "none", "the training mean, for every spot"),
}
"""Method -> source, loss, what differs from the original."""

FROM_A_TILE = {"mclstexp", "mclstexp_plus", "bleep", "heclip", "stnet", "m2ort", "hest_ridge", "consensus", "mean"}
"""Methods that predict from a tile alone, which is what `stexp-export` takes."""


def methods() -> str:
    """Every yaml of conf/model, built at published size."""
    seconds = seconds_per_epoch()
    encoders = (files.CONF / "image_encoder").glob("*.yaml")
    yaml_of = {OmegaConf.load(path).get("name"): path.stem for path in encoders}
    rows = [
        "| `model=` | source | loss | a batch | image encoder | predicts slides | differs from the original "
        "| parameters | of them image encoder | s/epoch |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    with initialize_config_dir(str(files.CONF), version_base="1.3"):
        for name in METHODS:
            cfg = compose("train", [f"model={name}", "data=her2st", "protocol=paper"])
            node = {key: value for key, value in config.to_plain(cfg.model).items() if key != "name"}
            encoder = config.to_plain(cfg.image_encoder) | {"pretrained": False, "checkpoint": None}
            if "image_encoder" in node:
                node["image_encoder"] = encoder
            with torch.device("meta"):
                width = config.build(encoder).num_features
                model = config.build(node, n_genes=N_GENES, n_positions=N_POSITIONS, n_features=width)
            sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
            of_encoder = sum(size for key, size in sizes.items() if key.startswith("image_encoder."))
            reads = name != "mean" and (of_encoder or "n_features" in model.__init__.__annotations__)
            source, loss, differs = METHODS[name]
            closed = getattr(model, "closed_form", False)
            batch = {"spots": "spots", "section": "a section"}[getattr(model, "batching", "spots")]
            cells = [
                f"[`{name}`](../src/{'/'.join(cfg.model._target_.split('.')[:-1])}.py)",
                source,
                loss,
                "all at once" if closed else batch,
                f"`{yaml_of[cfg.image_encoder.name]}`{'' if of_encoder else ', frozen'}" if reads else "",
                "yes" if name in FROM_A_TILE else "no",
                differs,
                "closed form" if closed else f"{sum(sizes.values()):,}",
                f"{of_encoder:,}",
                f"{seconds[name]:.3g}" if name in seconds and not closed else "",
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def seconds_per_epoch() -> dict[str, float]:
    """Of the kept runs on HER2+, patient B held out, image encoder frozen; checkpoints and validation included."""
    out = {}
    for path in sorted((HERE / "results").glob("her2st-strict-B-*.json")):
        kept = json.loads(path.read_text())
        record = kept["provenance"]
        epochs = record.get("epochs") or int(re.search(r"max_epochs=(\d+)|$", record["command"])[1] or 0)
        if "image_encoder.frozen=true" in record["command"] and "stages" in record and epochs:
            out[kept["model"]] = record["stages"]["fit"] / epochs
    return out


def encoders() -> str:
    """Every yaml of conf/image_encoder that has a card."""
    rows = [
        "| `image_encoder=` | F | input, px | trained at, um/px | output | licence of the weights | gated |",
        "|---|---|---|---|---|---|---|",
    ]
    with initialize_config_dir(str(files.CONF), version_base="1.3"):
        for path in sorted((files.CONF / "image_encoder").glob("*.yaml")):
            cfg = compose(
                "train", [f"image_encoder={path.stem}"] + (["image_encoder.name=resnet18"] * (path.stem == "timm"))
            )
            encoder = cfg.image_encoder
            if encoder.card is None:
                continue
            scale = encoder.card.um_per_px
            cells = [
                f"[`{path.stem}`]({encoder.card.url})",
                str(encoder.card.dim),
                str(encoder.input_size or "as they are"),
                "photographs"
                if scale is None
                else str(scale)
                if isinstance(scale, float | int)
                else ", ".join(map(str, scale)),
                encoder.output,
                encoder.card.licence,
                "yes" if encoder.card.get("gated") else "",
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    text = PAGE.read_text()
    for name, table in (("methods", methods()), ("encoders", encoders())):
        start, end = f"<!-- {name}: written by experiments/methods.py -->", f"<!-- end of {name} -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}"
    PAGE.write_text(text)
    print(f"wrote the tables of {PAGE}")


if __name__ == "__main__":
    main()
