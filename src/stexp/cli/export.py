"""``stexp-export run=runs/x output=model.stexp``: a finished run as a folder that predicts without its data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from stexp.config import command, to_plain
from stexp.config.compose import entry
from stexp.errors import InputError

if TYPE_CHECKING:
    pass
from stexp.inference.export import export


@entry("export")
def main(cfg: DictConfig) -> None:
    with command():
        for key, example in (("run", "runs/x"), ("output", "model.stexp")):
            if OmegaConf.is_missing(cfg, key):
                raise InputError(f"{key} is not given; as in: stexp-export run=runs/x output=model.stexp ({example})")
        output, plain = Path(cfg.output), to_plain(cfg)
        if output.exists() and not (cfg.overwrite and (output / "model.json").exists()):
            raise InputError(f"{output} exists; choose another output, or overwrite=true where it is an exported model")
        facts = export(
            Path(cfg.run), output, bank=cfg.bank, prototypes=cfg.prototypes, folds=plain["folds"], alpha=cfg.alpha
        )
        print("\n".join(lines(facts)))
        print(f"wrote {output}")


def lines(facts: dict) -> list[str]:
    """What was exported, for the terminal."""
    from stexp.inference import confidence

    out = [f"{facts['method']} of {facts['data']}, fold {facts['fold']}: {len(facts['panel'])} genes trained"]
    check = facts["reproduces"]
    out.append(
        f"  predicts {check['spots']} held-out spots as the run did, within {check['largest_difference']:.2g} "
        f"({check['mean_difference']:.2g} on average)"
    )
    if "bank" in facts:
        bank = facts["bank"]
        out.append(f"  bank: {bank['spots']} of {bank['of']} reference spots, embeddings in {bank['embedding']}")
        if "loss" in bank:
            loss = bank["loss"]
            out.append(
                f"  against the full bank: Pearson of predictions {loss['pearson_with_full']:.4f}; "
                f"ACG {loss['pearson_acg_full']:.4f} -> {loss['pearson_acg']:.4f}"
            )
    out.append(f"  accuracy to expect: from {len(facts['expected']['sections'])} held-out section(s)")
    out += confidence.lines(facts)
    return [*out, *(f"  licence of the {key}: {text}" for key, text in facts["licences"].items())]


if __name__ == "__main__":
    main()
