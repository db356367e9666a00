"""What model=consensus must beat, on one frozen encoder and with one budget: methods over folds and seeds.

python experiments/rivals.py --folds B C --seeds 0 1 2 data=her2st data.augmentation=none data.batch_size=64 \
    trainer.max_epochs=20 image_encoder=mobilenetv2 image_encoder.checkpoint=mobilenetv2_100_imagenet.safetensors

Keys are those of stexp-train, which runs as it does for users; the image encoder is frozen. `corrected` is
model.correct=true, a residual on what is retrieved. Each line is the difference to consensus, paired over the test
sections of all folds with a 95 % interval, seeds averaged before. A run takes 10 to 90 seconds on one core where the
features are in the cache. What is finished stays in the output, and the same command goes on from there.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ablation_table import best_first
from keyed_arguments import over_folds_and_seeds, parse, unfinished
from one_change import SCORES, compared, elsewhere

from stexp import hardware
from stexp.api.train import train_run
from stexp.cli.fold import config_of
from stexp.config import build, dataset_of
from stexp.config.compose import compose
from stexp.data.section import Section
from stexp.files import write_atomically
from stexp.runs.provenance import git_state, manifest, now, versions

BASE = "consensus"
CONTRASTIVE = ("mclstexp", "bleep", "heclip", "stgchb")
METHODS: dict[str, list[str]] = {BASE: ["model=consensus"], "deepspot": ["model=deepspot"]}
for _name in CONTRASTIVE:
    METHODS[_name] = [f"model={_name}"]
    METHODS[f"{_name}, corrected"] = [f"model={_name}", "model.correct=true"]
METHODS["mclstexp_plus"] = ["model=mclstexp_plus"]


def measure(keys: list[str], fold: str, seed: int, sections: list[Section]) -> dict[str, Any]:
    """Train and score a method on one fold: ``sections`` and ``seconds``."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        cfg = compose("train", [*keys, f"fold={fold}", f"seed={seed}", "random_features=0", f"output_dir={run}"])
        trained = train_run(config_of(cfg, fold, run), sections)
    assert trained is not None  # there is one process
    patients = {section.name: section.patient for section in sections}
    of = {
        f"{fold}:{name}": {key: part["scores"][key] for key in SCORES} | {"patient": patients[name]}
        for name, part in trained.metrics["sections"].items()
    }
    return {"sections": of, "seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    parser = over_folds_and_seeds(__doc__, METHODS, "rivals-<data>-<protocol>.json")
    args, keys = parse(parser)
    keys = ["image_encoder.frozen=true", *keys]
    cfg, state = compose("train", [*METHODS[BASE], *keys]), git_state()
    output = args.output or Path(__file__).parent / "results" / f"rivals-{cfg.data.name}-{cfg.protocol.name}.json"
    runs: dict[str, dict[str, dict]] = unfinished(output, elsewhere(keys), state["commit"])
    sections = dataset_of(cfg).read_sections(build(cfg.protocol))
    for seed in args.seeds:
        for fold in args.folds:
            for name in [BASE, *(each for each in args.only if each != BASE)]:
                key = f"{fold} s{seed}"
                if key in runs.get(name, {}):
                    continue
                made = measure([*METHODS[name], *keys], fold, seed, sections)
                runs.setdefault(name, {})[key] = made
                scores = [f"{own['pearson_acg']:.4f}" for own in made["sections"].values()]
                print(f"{key}  {name:<24}", *scores, f"{made['seconds']:.0f} s", flush=True)
                record = {
                    "command": shlex.join(["python", "experiments/rivals.py", *elsewhere(sys.argv[1:])]),
                    "keys": elsewhere(keys),
                    **state,
                    "date": now(),
                    "hardware": hardware.describe(),
                    "versions": versions(),
                    "data_manifest": manifest(sections),
                    "methods": {each: METHODS[each] for each in runs},
                    "table": compared(runs, BASE),
                    "runs": runs,
                }
                write_atomically(output, json.dumps(record, indent=1) + "\n")
    print("\n".join([*best_first(compared(runs, BASE)), f"wrote {output}"]))


if __name__ == "__main__":
    main()
