"""``stexp-floors``: floors and ceiling of a data set, without images and without training."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from stexp.config import build, command, dataset_of
from stexp.config.compose import entry
from stexp.files import write_atomically, write_csv
from stexp.protocol import Protocol

if TYPE_CHECKING:
    from stexp.data.section import Section  # brings anndata


@entry("floors")
def main(cfg: DictConfig) -> None:
    with command():
        from stexp.evaluation.floors import ORACLES, floors_without_images  # scikit-learn, which --help does without

        protocol, dataset = build(cfg.protocol), dataset_of(cfg)
        sections = dataset.read_sections(protocol)
        scores = floors_without_images(sections, protocol, dataset.panel(protocol))
        written = (
            [] if cfg.output_dir is None else write(dataset.name, sections, protocol, scores, Path(cfg.output_dir))
        )
        truth = {"spot": "scaled per spot", "gene": "scaled per gene, over the spots of its section"}
        scaled = truth.get(protocol.truth, "Pearson residuals of each section")
        print(
            f"{dataset.name}, protocol {protocol.name}: {len(sections)} sections, "
            f"each {protocol.hold_out} held out in turn; "
            f"truth {scaled}, {protocol.log} log, library: {protocol.library}"
        )
        print(f"  {'':<28}     ACG   HEG50     MSE     MAE")
        for name, means in scores.items():
            cells = (means.get(key) for key in ("pearson_acg", "pearson_heg50", "mse", "mae"))
            print(
                f"  {name + (' (oracle)' if name in ORACLES else ''):<28}"
                + "".join("       -" if cell is None else f"{cell:8.4f}" for cell in cells)
            )
        for path in written:
            print(f"wrote {path}")


def write(
    data: str, sections: list[Section], protocol: Protocol, scores: dict[str, dict], folder: Path
) -> tuple[Path, Path]:
    """Write ``floors.json``, with the protocol and the names of the sections, and ``floors.csv``, a row a floor."""
    # pandas and anndata, which --help does without
    import pandas as pd

    from stexp.evaluation.floors import ORACLES

    folder.mkdir(parents=True, exist_ok=True)
    names = [section.name for section in sections]
    facts = {"data": data, "protocol": asdict(protocol), "sections": names, "oracles": sorted(ORACLES & set(scores))}
    write_atomically(folder / "floors.json", json.dumps(facts | {"scores": scores}, indent=1))
    write_csv(pd.DataFrame.from_dict(scores, orient="index"), folder / "floors.csv", index="floor")
    return folder / "floors.json", folder / "floors.csv"


if __name__ == "__main__":
    main()
