"""Learned prototypes against as many spots selected after training, and all of them: accuracy and size of the bank.

python experiments/prototypes.py data=her2st data.augmentation=none model.normalise=true model.temperature=0.1 \
    trainer.max_epochs=10 image_encoder=mobilenetv2 image_encoder.checkpoint=mobilenetv2_100_imagenet.safetensors \
    --folds B C --seeds 0 1 2

Keys are those of stexp-train; the image encoder is frozen. All spots and what is selected of them come from the same
training, with the k it chose, as stexp-export prototypes=N has it; learned prototypes choose their own. Differences are
paired over the test sections of all folds, seeds averaged before. Bytes are those of the file that an exported model
keeps its references in. What is finished stays in the output, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from keyed_arguments import parse
from one_change import compared, elsewhere, scored, trained

from stexp import hardware
from stexp.api.features import frozen_encoder, machine_of
from stexp.config import build, dataset_of, to_plain
from stexp.config.compose import compose
from stexp.data.datamodule import SpotDataModule
from stexp.inference.bank import Bank, write_bank
from stexp.inference.prototype_bank import AnyBank, write_prototype_bank
from stexp.inference.references import nearest_to_centres, prototypes_of, spots_of
from stexp.models.prototypes import stand_for
from stexp.models.retrieval import ReferenceIndex, retrieve
from stexp.models.retrieval_method import RetrievalMethod
from stexp.runs.provenance import git_state, manifest, now, versions

ALL = "all spots"
MODEL = ["model=mclstexp", "image_encoder.frozen=true"]
CONTRAST = ("loss", "log_batch", "matched", "chance", "left_chance")


def measure(keys: list[str], fold: str, seed: int, data: SpotDataModule, sizes: list[int]) -> dict[str, dict[str, Any]]:
    """Ways to keep references -> what `compared` reads, with ``references``, ``k`` and ``bytes``."""
    out = {}
    for n in (None, *sizes):
        start = time.perf_counter()
        settings = [*keys, *([] if n is None else [f"model.prototypes={n}"])]
        method, prediction, contrast = trained(settings, seed, data)
        assert isinstance(method, RetrievalMethod) and prediction.image_embedding is not None
        index, expression = method._searched
        seconds = round(time.perf_counter() - start, 1)
        facts = {"contrast": {key: contrast[key] for key in CONTRAST}, "seconds": seconds, "k": method._k(index)}
        name = ALL if n is None else f"{n} learned"
        bank = bank_of_method(method, data)
        sections = scored(prediction.predicted.numpy(), data, fold)
        out[name] = {**facts, "sections": sections, "references": len(index), "bytes": size_of(bank)}
        for few in () if n is not None else sizes:
            rows = nearest_to_centres(index.embedding.cpu().numpy(), few)
            of = (np.asarray(each)[rows] for each in (index.section, index.patient))
            fewer = ReferenceIndex(index.embedding[torch.from_numpy(rows)], *of)
            k = min(method._k(index), len(rows))
            how = method.distance, method.weighting
            made = retrieve(fewer, prediction.image_embedding, expression.cpu()[rows], k, *how, spread=False)
            sections = scored(made.predicted.numpy(), data, fold)
            out[f"{few} selected"] = {**facts, "k": k, "sections": sections, "references": len(rows)}
            assert isinstance(bank, Bank)  # of all spots
            out[f"{few} selected"]["bytes"] = size_of(bank.take(rows))
    return out


def size_of(bank: AnyBank) -> int:
    """Bytes of a bank's file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bank.safetensors"
        if isinstance(bank, Bank):
            write_bank(path, bank)
        else:
            write_prototype_bank(path, bank)
        return path.stat().st_size


def bank_of_method(method: RetrievalMethod, data: SpotDataModule) -> AnyBank:
    """What an export of the method would keep of its references."""
    references = method.references
    assert references is not None
    rows = references.retrieved_rows
    place = np.flatnonzero(np.isin(references.rows, rows))
    embedding = references.embedding[torch.from_numpy(place)]
    if references.prototype is None:
        return spots_of(data, rows, embedding.cpu().numpy())
    return prototypes_of(data, rows, stand_for(references.prototype[place], embedding, data.spots.iloc[rows]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", nargs="+", required=True, metavar="FOLD", help="held out in turn")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 256], help="at most the spots that train")
    parser.add_argument("--output", type=Path, help="default: experiments/results/prototypes-<data>-<protocol>.json")
    args, keys = parse(parser)
    keys = [*MODEL, *keys]
    cfg, state = compose("train", keys), git_state()
    output = args.output or Path(__file__).parent / "results" / f"prototypes-{cfg.data.name}-{cfg.protocol.name}.json"
    config = to_plain(cfg)
    machine_of(config).set_threads()
    before = json.loads(output.read_text()) if output.exists() else {}
    same = before.get("keys") == elsewhere(keys) and before.get("provenance", {}).get("commit") == state["commit"]
    runs: dict[str, dict[str, dict]] = before["runs"] if same else {}
    sections = dataset_of(cfg).read_sections(build(cfg.protocol))
    served: dict[str, SpotDataModule] = {}
    record: dict[str, Any] = {"what": "references kept as spots, as spots selected, and as learned prototypes"}

    def write() -> None:
        record.update(keys=elsewhere(keys), table=compared(runs, ALL), runs=runs)
        record["provenance"] = {
            "command": shlex.join(["python", "experiments/prototypes.py", *elsewhere(sys.argv[1:])]),
            **state,
            "date": now(),
            "hardware": hardware.describe(),
            "versions": versions(),
            "data_manifest": manifest(sections),
        }
        output.write_text(json.dumps(record, indent=1) + "\n")

    for seed in args.seeds:
        for fold in args.folds:
            key = f"{fold} s{seed}"
            if key in runs.get(ALL, {}):
                continue
            if fold not in served:
                frozen = frozen_encoder(config, machine_of(config))
                served[fold] = dataset_of(cfg).serve(sections, build(cfg.protocol), fold, cfg.seed, encoder=frozen)
            for way, made in measure(keys, fold, seed, served[fold], args.sizes).items():
                runs.setdefault(way, {})[key] = made
                values = " ".join(f"{v['pearson_acg']:.4f}" for v in made["sections"].values())
                print(f"{key}  {way:<14} k={made['k']:<4} {made['references']:<5} {values}", flush=True)
            write()
    write()
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
