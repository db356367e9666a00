"""How a cohort grows: seconds and memory of every command at 10, 100 and 1,200 sections of 1,250 spots.

Generated sections: smooth random images, tiles of 16 px, 2,000 genes of which 1,000 are predicted. A spot's counts are
drawn gene by gene, some 350 of them, so that nine values of ten are zero, as in HEST-1k. Two sections are of one
patient; one patient is held out, so that what is predicted stays the same while what is learnt from grows.

Each command runs in a process of its own, with one thread; ``cpu_s`` is what it computed, whatever else was running.
The second start is that of another run folder, with everything in the cache, and ends when training begins.
``memory_gb`` is the peak of its resident memory and counts pages of mapped files, which the system takes back when it
needs them; ``own_gb`` is the peak without these.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from PIL import Image

from stexp import hardware
from stexp.data.readers import samplesheet
from stexp.runs.provenance import git_state, now, versions

N_SPOTS, SIDE, PITCH_PX, TILE_PX = 1250, 36, 20, 16
N_GENES, N_PANEL, DEPTH = 2000, 1000, 350
COMMON = (f"data.tile_px={TILE_PX}", "hardware.precision=32-true", "hardware.threads=1", "trainer.accelerator=cpu")
FROZEN = ("image_encoder=tiny", "image_encoder.frozen=true", "data.augmentation=none", "trainer.max_epochs=1")
MEMORY = ("memory_gb", "own_gb")
AIM_GB, AIM_S = 6.0, 60.0


def write_cohort(folder: Path, n_sections: int) -> None:
    """A sample sheet with an image, sparse counts and positions per section, and a panel of genes."""
    folder.mkdir(parents=True)
    genes = pd.DataFrame(index=[f"GENE{i:04}" for i in range(N_GENES)])
    (folder / "panel.txt").write_text("\n".join(genes.index[::2][:N_PANEL]))
    rows = []
    for number in range(n_sections):
        rng, name = np.random.default_rng(number), f"S{number:04}"
        size = (SIDE + 2) * PITCH_PX
        coarse = Image.fromarray(rng.integers(60, 230, (size // 4, size // 4, 3), dtype=np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{name}.jpg", quality=90)
        y, x = np.divmod(np.arange(N_SPOTS), SIDE)
        ids = [f"{i}x{j}" for i, j in zip(x, y, strict=True)]
        spots = pd.DataFrame({"array_x": x, "array_y": y}, index=pd.Index(ids, name="spot"))
        spots["pixel_x"], spots["pixel_y"] = (PITCH_PX * (n + 1.5) for n in (x, y))
        spots.to_csv(folder / f"{name}.csv")
        depth = rng.negative_binomial(4, 4 / (4 + DEPTH), N_SPOTS) + 60
        share = np.random.default_rng(0).lognormal(0, 1.0, N_GENES) * rng.lognormal(0, 0.2, N_GENES)
        gene = np.searchsorted(np.cumsum(share / share.sum())[:-1], rng.random(depth.sum()))
        spot = np.repeat(np.arange(N_SPOTS), depth)
        counts = sp.csr_matrix((np.ones(len(spot), np.float32), (spot, gene)), shape=(N_SPOTS, N_GENES))
        counts.sum_duplicates()
        ad.AnnData(counts, obs=pd.DataFrame(index=ids), var=genes).write_h5ad(
            folder / f"{name}.h5ad", compression="gzip", compression_opts=1
        )
        rows.append((name, f"P{number // 2:03}", f"{name}.jpg", f"{name}.h5ad", f"{name}.csv", 1.0))
    pd.DataFrame(rows, columns=list(samplesheet.COLUMNS)).to_csv(folder / "sheet.csv", index=False)


def measure(arguments: list[str], log: Path, run: Path | None = None, stop: bool = False) -> dict[str, Any]:
    """Seconds and peak memory of a command; with the folder of a run also its stages, and when its training began.

    Parameters
    ----------
    stop
        End the command when its training begins.
    """
    start, began = time.perf_counter(), None
    peak, ended, status, usage = {"VmHWM": 0, "RssAnon": 0}, 0, 0, None
    with log.open("w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=file, stderr=file, env=environment)
        while not ended:
            peak = {key: max(peak[key], value) for key, value in _memory_kb(process.pid, *peak).items()}
            if began is None and run is not None and "model" in _stages(run):
                began = time.perf_counter() - start
                if stop:
                    process.kill()
            time.sleep(0.1)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode and not (stop and began):
        raise SystemExit(f"{' '.join(arguments)} failed:\n{log.read_text()[-2000:]}")
    told: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 1)}
    told["cpu_s"] = round(usage.ru_utime + usage.ru_stime, 1) if usage else None
    told |= {name: round(value * 1024 / 1e9, 3) for name, value in zip(MEMORY, peak.values(), strict=True)}
    if run is not None:
        told |= {"training_began_s": began and round(began, 1), "stages": _stages(run)}
    return told


def _stages(folder: Path) -> dict:
    try:
        return json.loads((folder / "stages.json").read_text())
    except (OSError, ValueError):  # not there yet, or half written
        return {}


def _memory_kb(process: int, *keys: str) -> dict[str, int]:
    """What Linux says of a process; zeros once it is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        status = ""
    values = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.endswith(" kB")}
    return {key: int(values.get(key, 0)) for key in keys}


def steps(folder: Path, n_sections: int, skipped: list[str]) -> Iterator[tuple[str, dict]]:
    """Every command on one cohort, in order; the second start of a training ends when it trains."""
    sources = folder / "data"  # apart from what commands write: who looks for changes finds none
    data = ["data=samplesheet", f"data.sheet={sources}/sheet.csv", f"data.panel_file={sources}/panel.txt"]
    data += [f"data.cache_dir={folder}/cache", f"fold=P{n_sections // 4:03}", *COMMON]
    stnet = ["model=stnet", "model.symmetries=false", "model.input_scale=image_encoder", *FROZEN]
    run, again, ridge = folder / "stnet", folder / "again", folder / "ridge"
    slide = [f"slide={sources}/S0000.jpg", "um_per_px=1.0", f"coordinates={sources}/S0000.csv", "device=cpu"]
    plan: dict[str, tuple[list[str], Path | None]] = {
        "prepare": (["stexp.cli.prepare", *data[:4], *COMMON[:2], "features=tiny", f"output_dir={folder}/qc"], None),
        "train": (["stexp.cli.train", *data, *stnet, f"output_dir={run}"], run),
        "second start": (["stexp.cli.train", *data, *stnet, f"output_dir={again}"], again),
        "score": (["stexp.cli.score", f"run={run}"], None),
        "report": (["stexp.cli.report", f"run={run}"], None),
        "predict": (["stexp.cli.predict", f"run={run}", *slide, f"output_dir={folder}/predicted"], None),
        "ridge": (["stexp.cli.train", *data, "model=hest_ridge", *FROZEN, f"output_dir={ridge}"], ridge),
    }
    for name, (arguments, run_folder) in plan.items():
        if name not in skipped:
            told = measure(arguments, folder / f"{name}.log", run_folder, stop=name == "second start")
            print(f"{n_sections:>6}  {name:<14}" + _cells(told), flush=True)
            yield name, told


def _cells(told: dict) -> str:
    began = told.get("training_began_s")
    text = f"{told['seconds']:>9.1f} s {told['cpu_s']:>9.1f} s CPU {told['memory_gb']:>7.2f} GB"
    text += f" {told['own_gb']:>7.2f} GB own"
    return text + ("" if began is None else f", training began after {began:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", type=int, nargs="+", default=[10, 100], help="sizes, such as 10 100 1200")
    parser.add_argument("--folder", type=Path, required=True, help="where cohorts are written, and removed again")
    parser.add_argument("--skip", nargs="+", default=[], help="steps to leave out, such as prepare")
    parser.add_argument("--output", type=Path, help="default experiments/results/bench-scale.json")
    args = parser.parse_args()
    skipped = " --skip " + " ".join(args.skip) if args.skip else ""
    sizes = " ".join(map(str, args.sections))
    record = {"command": f"python experiments/bench_scale.py --sections {sizes}{skipped} --folder FOLDER"}
    record |= {**git_state(), "date": now(), "hardware": hardware.describe(), "versions": versions()}
    record |= {"spots_of_a_section": N_SPOTS, "genes": N_GENES, "panel": N_PANEL, "tile_px": TILE_PX, "threads": 1}
    record["sections"] = {}
    output = args.output or Path(__file__).parent / "results" / "bench-scale.json"
    for n_sections in args.sections:
        folder = args.folder.absolute() / f"cohort{n_sections}"
        start = time.perf_counter()
        write_cohort(folder / "data", n_sections)
        print(f"{n_sections:>6}  made after {time.perf_counter() - start:.0f} s", flush=True)
        own = record["sections"][str(n_sections)] = {}
        for name, told in steps(folder, n_sections, args.skip):
            own[name] = told
            record["ratios"] = ratios(record["sections"])
            output.write_text(json.dumps(record, indent=1) + "\n")
        shutil.rmtree(folder)
    for line in lines(record):
        print(line)
    print(f"wrote {output}")


def ratios(sections: dict[str, dict]) -> dict[str, dict]:
    """Of each step, seconds and memory of a size over those of the size before; linear growth is at most the sizes'."""
    sizes, out = list(sections), {}
    for before, after in itertools.pairwise(sizes):
        own = {}
        for step, told in sections[after].items():
            keys = ("seconds", "cpu_s", *MEMORY)
            own[step] = {key: round(told[key] / sections[before][step][key], 2) for key in keys}
        out[f"{after} to {before}"] = own
    return out


def lines(record: dict) -> list[str]:
    """Ratios, and whether the aims are reached at the largest size."""
    out = []
    for sizes, own in record["ratios"].items():
        for step, told in own.items():
            cells = ", ".join(f"{key} x {value:.2f}" for key, value in told.items())
            out.append(f"{sizes:>14}  {step:<14}{cells}")
    largest = record["sections"][max(record["sections"], key=int)]
    highest = max(told["memory_gb"] for told in largest.values())
    start = largest["second start"]
    out.append(
        f"memory at most {highest:.2f} GB (aim {AIM_GB:g}); second start {start['cpu_s']:.1f} s of processor time "
        f"(aim {AIM_S:g}), {start['training_began_s']:.1f} s by the clock"
    )
    return out


if __name__ == "__main__":
    main()
