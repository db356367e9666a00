"""Seconds and memory of model=consensus on many spots: ``python experiments/bench_consensus.py --spots 15000 150000``.

Made-up spots of sections of 15,000 lie on a square array, their features and expression in files that are mapped into
memory, as they would be read from a cache. Each number of spots is fitted, and one of its sections predicted, in a
process of its own; its peak memory is what it holds itself (RssAnon), without pages of those files. Seconds are those
of its processor, one thread, beside those of the clock, which is longer where others use the machine. The files are
deleted behind it. 1,500,000 spots take 7.6 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap

from stexp import hardware
from stexp.models.consensus import Consensus
from stexp.models.table import Table
from stexp.runs.provenance import git_state, now, versions

SECTION = 15_000  # spots
HIDDEN = 12  # fields that make features and expression
BLOCK = 8192  # spots that are made at once
SAMPLED = 0.02  # seconds between looks at the memory


def make(folder: Path, n: int, n_features: int, n_genes: int) -> None:
    """``features.npy`` and ``expression.npy`` of n spots: smooth fields of each section, mixed, and noise."""
    rng = np.random.default_rng(0)
    mixing = [rng.normal(size=(HIDDEN, columns)).astype(np.float32) for columns in (n_features, n_genes)]
    out = [
        open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=(n, columns))
        for name, columns in (("features", n_features), ("expression", n_genes))
    ]
    for start in range(0, n, BLOCK):
        rows = np.arange(start, min(start + BLOCK, n))
        waves = (xy_of(rows)[:, rows[:HIDDEN] % 2] / np.linspace(300, 1500, HIDDEN)).astype(np.float32)
        hidden = np.sin(waves + (rows // SECTION)[:, None])
        for values, mix, noise in zip(out, mixing, (2.0, 1.0), strict=True):
            values[rows] = hidden @ mix + noise * rng.standard_normal((len(rows), mix.shape[1]), dtype=np.float32)
    for values in out:
        values.flush()


def xy_of(rows: np.ndarray) -> np.ndarray:
    """Places in micrometres, 100 apart on the array of a section."""
    across = int(np.ceil(np.sqrt(SECTION)))
    return np.stack(np.divmod(rows % SECTION, across), axis=1) * 100.0


class Peak:
    """Largest memory of this process in the ``with``, in bytes, without pages of files."""

    def __enter__(self) -> Peak:
        self.bytes, self._ends = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ends.wait(SAMPLED):
            lines = Path("/proc/self/status").read_text().splitlines()
            self.bytes = max([self.bytes, *(1024 * int(line.split()[1]) for line in lines if "RssAnon" in line)])

    def __exit__(self, *error: object) -> None:
        self._ends.set()
        self._thread.join()


def measured(work: Callable[[], Any]) -> dict[str, float]:
    with Peak() as peak:
        clock, processor = time.perf_counter(), time.process_time()
        work()
        seconds = {"seconds": time.process_time() - processor, "seconds_of_clock": time.perf_counter() - clock}
    return {key: round(value, 1) for key, value in seconds.items()} | {"peak_gb": round(peak.bytes / 1e9, 2)}


def run(folder: Path, pipe: Connection) -> None:
    """Fit to what is in a folder, and predict its first section."""
    torch.set_num_threads(1)
    features, expression = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("features", "expression"))
    rows = np.arange(len(features))
    section = np.char.add("S", (rows // SECTION // max(1, len(rows) // SECTION // 100)).astype(str))
    if len(np.unique(section)) < 3:
        section = np.char.add("S", (rows * 4 // len(rows)).astype(str))
    table = Table(features, expression, xy_of(rows).astype(np.float32), section, section)
    method = Consensus(expression.shape[1], features.shape[1])
    before = measured(lambda: time.sleep(5 * SAMPLED))["peak_gb"]
    fit = measured(lambda: method.fit_table(table))
    some = rows[:SECTION]

    def predict() -> None:
        embedding = method.embed_features(torch.from_numpy(features[some]))
        method.predict_together(embedding, torch.from_numpy(table.xy_um[some]))

    pipe.send(
        {
            "spots": len(rows),
            "before_gb": before,
            "fit": fit,
            "predict": {"spots": len(some), **measured(predict)},
            "searched": len(method.reference),
            "chosen": method.tune(None),  # type: ignore[arg-type]  # which reads nothing of the data
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spots", nargs="+", type=int, default=[15_000, 150_000])
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="for the files; default: a temporary one")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "bench-consensus.json")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started
    rows = []
    for n in args.spots:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            make(Path(folder), n, args.features, args.genes)
            here, there = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.get_context("spawn").Process(target=run, args=(Path(folder), there))
            process.start()
            there.close()
            rows.append(here.recv())
            process.join()
        print(json.dumps(rows[-1]), flush=True)
    record = {
        "command": " ".join(["python experiments/bench_consensus.py", *sys.argv[1:]]),
        **git_state(),
        "date": now(),
        "hardware": hardware.describe(),
        "versions": versions(),
        "features": args.features,
        "genes": args.genes,
        "rows": rows,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
