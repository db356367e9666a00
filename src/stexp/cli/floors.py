"""``stexp-floors``: floors and ceiling of a data set, without images and without training."""

from __future__ import annotations

from omegaconf import DictConfig

from stexp.config import build, command, to_plain
from stexp.config.compose import entry
from stexp.data.dataset import DataSet
from stexp.evaluation.floors import ORACLES, floors_without_images


@entry("floors")
def main(cfg: DictConfig) -> None:
    with command():
        protocol, dataset = build(cfg.protocol), DataSet(to_plain(cfg.data))
        sections = dataset.read_sections(protocol)
        scores = floors_without_images(sections, protocol, dataset.panel(protocol))
        what = "spot" if protocol.truth == "spot" else "gene, over the spots of its section"
        print(
            f"{dataset.name}, protocol {protocol.name}: {len(sections)} sections, "
            f"each {protocol.hold_out} held out in turn; "
            f"truth scaled per {what}, {protocol.log} log, library: {protocol.library}"
        )
        print(f"  {'':<28}     ACG   HEG50     MSE     MAE")
        for name, means in scores.items():
            cells = (means.get(key) for key in ("pearson_acg", "pearson_heg50", "mse", "mae"))
            print(
                f"  {name + (' (oracle)' if name in ORACLES else ''):<28}"
                + "".join("       -" if cell is None else f"{cell:8.4f}" for cell in cells)
            )


if __name__ == "__main__":
    main()
