"""``stexp-export run=runs/x output=model.stexp``: a finished run as a folder that predicts without its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from stexp.config import command, to_plain
from stexp.config.compose import entry
from stexp.errors import InputError


@entry("export")
def main(cfg: DictConfig) -> None:
    with command():
        for key, example in (("run", "runs/x"), ("output", "model.stexp")):
            if OmegaConf.is_missing(cfg, key):
                raise InputError(f"{key} is not given; as in: stexp-export run=runs/x output=model.stexp ({example})")
        # torch is heavy, and help does without it
        from stexp.inference.export import export, finished_export
        from stexp.training.machine import take_free_threads

        plain = to_plain(cfg)
        run, output = (Path(str(plain[key])).expanduser() for key in ("run", "output"))
        options = {key: plain[key] for key in ("bank", "prototypes", "folds", "alpha")}
        facts = None if plain["overwrite"] else finished_export(run, output, **options)
        if facts is not None:
            print("\n".join(lines(facts)))
            print(f"{output} was exported by this command already; give overwrite=true to export it again")
            _share(output, plain)
            return
        if output.exists() and not (plain["overwrite"] and (output / "model.json").exists()):
            raise InputError(f"{output} exists; choose another output, or overwrite=true where it is an exported model")
        take_free_threads()
        print("\n".join(lines(export(run, output, **options))))
        print(f"wrote {output}")
        _share(output, plain)


def _share(output: Path, plain: dict[str, Any]) -> None:
    """Put the model on the hub where the command asks for it."""
    if plain["push_to"] is not None:
        from stexp.inference.hub import push_to_hub  # brings torch

        print(f"shared as {push_to_hub(output, str(plain['push_to']), private=plain['private'])}")


def lines(facts: dict) -> list[str]:
    """What was exported, for the terminal."""
    from stexp.inference import confidence  # brings torch

    out = [f"{facts['method']} of {facts['data']}, fold {facts['fold']}: {len(facts['panel'])} genes trained"]
    check = facts["reproduces"]
    out.append(
        f"  predicts {check['spots']} held-out spots as the run did, within {check['largest_difference']:.2g} "
        f"({check['mean_difference']:.2g} on average)"
    )
    if "bank" in facts:
        bank = facts["bank"]
        what = f"{bank['spots']} prototypes" if facts["model"].get("prototypes") else str(bank["spots"])
        out.append(f"  bank: {what} of {bank['of']} reference spots, embeddings in {bank['embedding']}")
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
