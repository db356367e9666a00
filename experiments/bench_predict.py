"""How fast tiles of a slide reach an encoder: ``python experiments/bench_predict.py --help``.

A pyramidal TIFF as scanners write them (JPEG, tiles of 256 px, 0.25 um/px) is made of generated tissue, once, into a
cache folder; tissue is found on it, and a grid is laid. Ours streams the tiles of the grid from the file through the
encoder. Bare is the encoder alone, fed with tiles that lie in memory. Each is a process of its own, so that its peak
memory is its own; they take turns, and medians are kept. Afterwards all tiles are streamed once without an encoder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import imagecodecs
import numpy as np
import tifffile
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from stexp import hardware
from stexp.config import build
from stexp.data.augment import augment
from stexp.data.demo_tissue import lay_out_tissue, paint, place_nuclei
from stexp.data.slides.grid import make_grid
from stexp.data.slides.slide import Slide
from stexp.data.slides.stream import tile_batches
from stexp.data.slides.tissue import tissue_mask
from stexp.files import CONF
from stexp.runs.provenance import git_state, now, versions

UM, TILE, BLOCK = 0.25, 256, 4096  # um/px and tile of the slide; side of what it repeats
MARGIN_PX = 384  # of painted tissue around a block, where there is glass
PX = 224
GEOMETRIES = {"as the slide has them": PX * UM, "at half the slide's scale": 2 * PX * UM}  # side of a tile, um


def make_slide(path: Path, size: int, block: int = BLOCK) -> None:
    """An ellipse of tissue on glass, `size` px wide and high; levels by halves, until a block of it is one tile."""
    n_levels = (block // TILE).bit_length()
    with ThreadPoolExecutor(3) as pool:
        first, second, glass = pool.map(_block, (0, 1, None), (block,) * 3)
    blocks = [[first, second], [glass]]
    middle = (np.arange(-(-size // block)) + 0.5) * block / size * 2 - 1
    tissue = middle[:, None] ** 2 + (1.3 * middle) ** 2 < 0.9

    def tiles(level: int) -> Iterator[bytes]:
        n, across = block // TILE >> level, -(-(size >> level) // TILE)
        for row, column in itertools.product(range(across), repeat=2):
            (down, y), (right, x) = divmod(row, n), divmod(column, n)
            kinds = blocks[0 if tissue[down, right] else 1]
            yield kinds[(down + right) % len(kinds)][level][y * n + x]

    part = path.with_suffix(".part")
    with tifffile.TiffWriter(part, bigtiff=True) as writer:
        for level in range(n_levels):
            writer.write(
                tiles(level),
                shape=(size >> level, size >> level, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                subfiletype=int(level > 0),
                resolution=(1e4 / UM / 2**level,) * 2,
                resolutionunit="centimeter",
                metadata=None,
            )
    os.replace(part, path)


def _block(seed: int | None, side: int) -> list[list[bytes]]:
    """The encoded tiles of every level of a block, row by row: tissue of a seed, or glass."""
    whole, out = Image.fromarray(_glass(side) if seed is None else _painted(seed, side)), []
    for level in range((side // TILE).bit_length()):
        pixels = np.asarray(whole.reduce(2**level))
        corners = itertools.product(range(0, len(pixels), TILE), repeat=2)
        parts = (np.ascontiguousarray(pixels[y : y + TILE, x : x + TILE]) for y, x in corners)
        out.append([imagecodecs.jpeg8_encode(part, level=85, subsampling="420") for part in parts])
    return out


def _painted(seed: int, side: int) -> np.ndarray:
    block, cut = (np.random.default_rng([seed, part]) for part in (0, 1))
    painted = side + 2 * MARGIN_PX
    size_um = (painted * UM,) * 2
    tissue = lay_out_tissue(block, cut, size_um)
    image = paint(block, cut, tissue, place_nuclei(cut, tissue, size_um), (painted,) * 2, UM)
    return image[MARGIN_PX : MARGIN_PX + side, MARGIN_PX : MARGIN_PX + side]


def _glass(side: int) -> np.ndarray:
    noise = 2 * np.random.default_rng(2).standard_normal((side, side, 3), dtype=np.float32)
    return (np.array([243, 242, 244], dtype=np.float32) + noise).clip(0, 255).astype(np.uint8)


def _in_turn(spec: dict) -> np.ndarray:
    """Centres in the order in which they are streamed, so that any piece of them is as dense as the whole."""
    xy = np.load(spec["grid"])
    x, y = (xy // 1024 // (spec["side"] // PX)).T
    return xy[np.lexsort((x, y))]


def _tiles(spec: dict, turn: int, steps: int) -> Iterator[np.ndarray]:
    """Batches of a turn: a stream that begins and ends with it, so that nothing is read before or in vain."""
    xy, n = _in_turn(spec), steps * spec["batch"]
    piece = np.take(xy, np.arange(turn * n, (turn + 1) * n), axis=0, mode="wrap")
    return (tiles for _, tiles in tile_batches(Slide(spec["slide"]), piece, spec["side"], PX, spec["batch"]))


@torch.inference_mode()
def work(spec: dict, pipe: Connection) -> None:
    """Encode as many batches as is asked for, and tell the seconds; at the end, the peak memory."""
    torch.set_num_threads(spec["threads"])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"image_encoder={spec['encoder']}", "image_encoder.pretrained=false"])
    encoder = build(cfg.image_encoder).eval().to(spec["device"], memory_format=torch.channels_last)
    precision = torch.autocast(spec["device"], torch.bfloat16, enabled=spec["precision"] == "bf16-mixed")
    in_memory = None if spec["ours"] else list(_tiles(spec, 0, 2))
    for turn in itertools.count():
        steps = pipe.recv()
        if steps is None:
            break
        start = time.perf_counter()
        for tiles in _tiles(spec, turn, steps) if spec["ours"] else itertools.islice(itertools.cycle(in_memory), steps):
            image = augment(torch.from_numpy(tiles).to(spec["device"]), "none", 0)
            with precision:
                encoder(image.contiguous(memory_format=torch.channels_last)).float().cpu()
        pipe.send(time.perf_counter() - start)
    pipe.send(hardware.peak_memory())


def stream_alone(spec: dict, pipe: Connection) -> None:
    """All tiles once, without an encoder."""
    torch.set_num_threads(spec["threads"])
    slide, before, start = Slide(spec["slide"]), hardware.peak_memory()["peak_memory_gb"], time.perf_counter()
    n = sum(len(rows) for rows, _ in tile_batches(slide, np.load(spec["grid"]), spec["side"], PX, spec["batch"]))
    seconds, peak = time.perf_counter() - start, hardware.peak_memory()["peak_memory_gb"]
    pipe.send({"tiles": n, "seconds": seconds, "peak_memory_gb": peak, "before_gb": before})


class Side:
    """A process that works when asked to."""

    def __init__(self, job, spec: dict) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=job, args=(spec, other), daemon=True)
        self.process.start()
        other.close()

    def ask(self, steps: int | None) -> float | dict:
        self.pipe.send(steps)
        return self.pipe.recv()


def compare(spec: dict, rounds: int, steps: int) -> dict:
    """Tiles per second of both sides, and the median of the rounds' ratios."""
    sides = {"ours": Side(work, {**spec, "ours": True}), "bare": Side(work, {**spec, "ours": False})}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):  # the first warms up
        for name, side in sides.items():
            seconds = side.ask(steps)
            if turn:
                rates[name].append(steps * spec["batch"] / seconds)
    told = {f"{name}_tiles_per_s": round(median(values), 1) for name, values in rates.items()}
    ratios = [ours / bare for ours, bare in zip(*rates.values(), strict=True)]
    told |= {"ratio": round(median(ratios), 3), "ratios": [round(ratio, 3) for ratio in ratios]}
    told["bound"] = 0.9 if spec["device"] == "cuda" else 0.85
    return told | {"peak_memory": {name: side.ask(None) for name, side in sides.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", type=int, default=60_000, help="side of the slide in px (default %(default)s: 1.2 GB)"
    )
    parser.add_argument("--cache", type=Path, default=Path("cache/bench"), help="where the slide is kept")
    parser.add_argument("--encoder", default="densenet121", help="of conf/image_encoder (default %(default)s)")
    parser.add_argument("--spacing", type=float, default=100.0, help="of the grid, um (default %(default)s)")
    parser.add_argument("--batch", type=int, help="tiles a batch (default 256 on a GPU, 32 on a CPU)")
    parser.add_argument("--steps", type=int, help="batches of a turn (default 50 on a GPU, 6 on a CPU)")
    parser.add_argument("--quick", action="store_true", help="two short rounds")
    parser.add_argument("--dry", action="store_true", help="one round on a slide of 2048 px, to see that it runs")
    parser.add_argument("--output", type=Path, help="default experiments/results/bench-predict-DEVICE.json")
    args = parser.parse_args()
    begun, gpu = time.perf_counter(), torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    size, block = (2048, 512) if args.dry else (args.size, BLOCK)
    path = args.cache / f"slide-{size}.tif"
    if not path.exists():
        args.cache.mkdir(parents=True, exist_ok=True)
        print(f"making {path}", flush=True)
        make_slide(path, size, block)
    slide, start = Slide(path), time.perf_counter()
    grid = make_grid(slide, UM, "hexagonal", args.spacing, tissue_mask(slide))
    np.save(args.cache / "grid.npy", grid.xy_px)
    facts = {
        "command": " ".join(["python", "experiments/bench_predict.py", *sys.argv[1:]]),
        "date": now(),
        "device": device,
        "precision": hardware.choose_precision("auto", device),
        **hardware.describe(),
        "threads": torch.get_num_threads(),
        "batch": 2 if args.dry else args.batch or (256 if gpu else 32),
        "encoder": args.encoder,
        "size": "dry" if args.dry else "quick" if args.quick else "full",
        "slide": {"px": size, "um_per_px": UM, "gb": round(path.stat().st_size / 1e9, 2)},
        "grid": {"spacing_um": args.spacing, "tiles": len(grid), "seconds": round(time.perf_counter() - start, 1)},
        "versions": versions(),
        **git_state(),
    }
    print("\n".join(f"{key}: {value}" for key, value in facts.items()), flush=True)
    rounds, steps = (5, args.steps or 50) if gpu else (5, args.steps or 6)
    rounds, steps = (1, 1) if args.dry else (2, steps // 3) if args.quick else (rounds, steps)
    facts["lines"] = []
    for name, um in list(GEOMETRIES.items())[: 1 if args.dry else None]:
        spec = {"slide": str(path), "grid": str(args.cache / "grid.npy"), "side": round(um / UM)}
        spec |= {key: facts[key] for key in ("batch", "threads", "device", "precision", "encoder")}
        told = {"tiles": name, "tile_um": um, **compare(spec, rounds, steps)}
        told["stream_alone"] = Side(stream_alone, spec).pipe.recv()
        facts["lines"].append(told)
        ours, bare = told["ours_tiles_per_s"], told["bare_tiles_per_s"]
        alone = told["stream_alone"]["tiles"] / told["stream_alone"]["seconds"]
        memory = told["stream_alone"]["peak_memory_gb"] - told["stream_alone"]["before_gb"]
        ratio = f"ratio {told['ratio']:.3f} (>= {told['bound']})"
        print(f"tiles of {um:g} um: {ours:.1f} a second, encoder alone {bare:.1f}, {ratio}")
        print(f"  the stream alone: {alone:.0f} a second, {1000 * memory:.0f} MB", flush=True)
    facts["seconds"] = round(time.perf_counter() - begun, 1)
    output = args.output or Path(__file__).parent / "results" / f"bench-predict-{device}.json"
    output.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"wrote {output} after {facts['seconds']:.0f} s")


if __name__ == "__main__":
    main()
