"""Seconds of a run of one epoch with empty and with warm caches, and what of it each stage takes.

``python experiments/bench_start.py data=visium data.root=... image_encoder=mobilenetv2 ... --other model=bleep seed=1``
gives its keys to ``stexp-train``, with caches and run in a temporary folder: with empty caches, three times again, with
the change of each ``--other``, and once more without the floors and pictures of the fold, which the first run on a fold
makes. Seconds are those of the clock, from the start of the process to its end; leave the machine to it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stexp import hardware
from stexp.runs.provenance import git_state, now, versions

OF_FOLD = ("comparisons", "pictures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "bench-start.json")
    args, keys = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        run, cache = Path(folder, "run"), Path(folder, "cache")
        places = [f"output_dir={run}", f"data.cache_dir={cache}", "overwrite=true"]

        def timed(what: str, *changes: str) -> dict:
            command = [sys.executable, "-m", "stexp.cli.train", *keys, *changes, *places]
            before, began = os.times(), time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds, after = time.perf_counter() - began, os.times()
            processor = sum(after[2:4]) - sum(before[2:4])  # of children
            stages = json.loads((run / "stages.json").read_text())
            row = {"what": what, "seconds": round(seconds, 1), "processor": round(processor, 1), "stages": stages}
            print(json.dumps(row), flush=True)
            return row

        rows = [timed("empty caches"), *(timed("the same again") for _ in range(3))]
        rows += [timed(change, change) for change in args.other]
        for name in OF_FOLD:
            shutil.rmtree(cache / name)
        rows.append(timed("without the floors and pictures of the fold"))
        manifest = json.loads((run / "provenance.json").read_text())["data_manifest"]
    record = {
        "command": shlex.join(["python", "experiments/bench_start.py", *sys.argv[1:]]),
        **git_state(),
        "date": now(),
        "hardware": hardware.describe(),
        "versions": versions(),
        "data_manifest": manifest,
        "rows": rows,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
