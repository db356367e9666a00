"""How stexp-prepare grows: seconds and memory as spots, or sections, grow tenfold and hundredfold.

Generated sections: smooth random images, one spot every 20 px, tiles of 32 px, 200 genes. Every size is read, cut,
measured and drawn in a process of its own, forked from one that has imported everything, so that the peak of its
memory is its own. Memory is counted over what the process began with. Growth is linear where what one more spot, or
section, takes ("more") stays the same; then the ratio of what each takes to that of the size before is one at most.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image

from stexp import hardware
from stexp.cli.prepare import prepare
from stexp.config import build, dataset_of
from stexp.data import quality
from stexp.data.readers import samplesheet
from stexp.data.slides import tiles
from stexp.files import CONF
from stexp.reporting import overlay
from stexp.runs.provenance import git_state, now, versions

TILE_PX, PITCH_PX, N_GENES = 32, 20, 200
SPOTS, SECTIONS = (200, 2_000, 20_000), (1, 10, 100)  # spots of one section; sections of 50 spots
SPOTS_OF_SECTION = 50
USES = (overlay, quality, tiles)  # imported here, so that no process pays for it


def write_data(folder: Path, n_sections: int, n_spots: int) -> None:
    """A sample sheet with an image, sparse counts and positions per section."""
    rng = np.random.default_rng(0)
    side = int(np.ceil(np.sqrt(n_spots)))
    size = (side + 2) * PITCH_PX
    rows = []
    for name in (f"S{i:03}" for i in range(n_sections)):
        coarse = Image.fromarray(rng.integers(120, 255, (size // 16 + 1, size // 16 + 1, 3), dtype=np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{name}.jpg", quality=90)
        y, x = np.divmod(np.arange(n_spots), side)
        ids = [f"{i}x{j}" for i, j in zip(x, y, strict=True)]
        spots = pd.DataFrame({"array_x": x, "array_y": y}, index=pd.Index(ids, name="spot"))
        spots["pixel_x"], spots["pixel_y"] = (PITCH_PX * (n + 1.5) for n in (x, y))
        spots.to_csv(folder / f"{name}.csv")
        counts = sp.random(n_spots, N_GENES, 0.3, "csr", np.float32, rng, lambda n: rng.integers(1, 20, n))
        genes = pd.DataFrame(index=[f"GENE{i:03}" for i in range(N_GENES)])
        ad.AnnData(counts, obs=pd.DataFrame(index=ids), var=genes).write_h5ad(folder / f"{name}.h5ad")
        rows.append((name, name, f"{name}.jpg", f"{name}.h5ad", f"{name}.csv", 1.0))
    pd.DataFrame(rows, columns=list(samplesheet.COLUMNS)).to_csv(folder / "sheet.csv", index=False)


def configure(folder: Path) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        paths = [f"data.sheet={folder}/sheet.csv", f"data.cache_dir={folder}/cache", f"output_dir={folder}/prepared"]
        return compose("prepare", ["data=samplesheet", f"data.tile_px={TILE_PX}", *paths])


def measured(folder: Path, answer: multiprocessing.connection.Connection) -> None:
    """Read, cut, measure and draw; tell the seconds and the peak over what the process began with."""
    cfg, before = configure(folder), resident_mb()
    start = time.perf_counter()
    sections = dataset_of(cfg).read_sections(build(cfg.protocol))
    read = time.perf_counter() - start
    prepare(cfg, sections, None)
    seconds = time.perf_counter() - start
    peak = 1000 * hardware.peak_memory()["peak_memory_gb"] - before
    answer.send({"seconds": seconds, "reading_s": read, "memory_mb": peak})


def resident_mb() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 / 1e6 for line in file if line.startswith("VmRSS"))


def grow(what: str, sizes: tuple[int, ...]) -> list[dict]:
    """Measure each size; print it beside the size before."""
    context, results = multiprocessing.get_context("fork"), []
    titles = (what, "seconds", "ms each", "ratio", "ms more", "MB", "kB each", "ratio", "kB more")
    print("".join(f"{title:>10}" for title in titles))
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="stexp-bench-") as scratch:
            folder = Path(scratch)
            write_data(folder, *((1, size) if what == "spots" else (size, SPOTS_OF_SECTION)))
            hear, tell = context.Pipe(duplex=False)
            process = context.Process(target=measured, args=(folder, tell))
            process.start()
            tell.close()
            told = {"size": size, **hear.recv()}
            process.join()
        for each, total in (("ms", 1000 * told["seconds"]), ("kb", 1000 * told["memory_mb"])):
            told |= {f"{each}_total": total, f"{each}_each": total / size}
            if results:
                before = results[-1]
                told[f"{each}_ratio"] = told[f"{each}_each"] / before[f"{each}_each"]
                told[f"{each}_more"] = (total - before[f"{each}_total"]) / (size - before["size"])
        results.append(told)
        keys = ("seconds", "ms_each", "ms_ratio", "ms_more", "memory_mb", "kb_each", "kb_ratio", "kb_more")
        cells = (f"{told[key]:.2f}" if key in told else "" for key in keys)
        print(f"{size:>10}" + "".join(f"{cell:>10}" for cell in cells), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="spots to 5,000 and sections to 20 only")
    parser.add_argument("--output", type=Path, help="default experiments/results/bench-prepare.json")
    args = parser.parse_args()
    logging.getLogger("stexp").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # threads do not outlive a fork
    start = time.perf_counter()
    spots, sections = ((50, 500, 5_000), (2, 20)) if args.quick else (SPOTS, SECTIONS)
    record = {"command": "python experiments/bench_prepare.py" + (" --quick" if args.quick else ""), **git_state()}
    record |= {"date": now(), "hardware": hardware.describe(), "versions": versions()}
    record |= {"tile_px": TILE_PX, "genes": N_GENES, "spots_of_a_section": SPOTS_OF_SECTION}
    record["spots"] = grow("spots", spots)
    record["sections"] = grow("sections", sections)
    record["seconds"] = round(time.perf_counter() - start, 1)
    output = args.output or Path(__file__).parent / "results" / "bench-prepare.json"
    output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {output} after {record['seconds']:.0f} s")


if __name__ == "__main__":
    main()
