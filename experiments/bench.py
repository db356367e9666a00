"""Speed and memory of stexp, as ratios measured in one run: ``python experiments/bench.py --help``.

Ours is what stexp-train runs. Plain is the same model in the style of the published code of mclSTExp: tiles cropped
and augmented one by one in the loader, float32 channels-first, tables of 65,536 positions under dense Adam, tiles of
every section embedded at evaluation, queries one by one. Every side is a process of its own, so that its peak memory
is its own and its allocator is as its user has it. The sides take turns; medians are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
import torchvision
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image
from scipy.stats import pearsonr
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from stexp import hardware
from stexp.cli.fold import train
from stexp.config import build, dataset_of, to_plain
from stexp.data.readers import samplesheet
from stexp.files import CONF
from stexp.models.blocks import ProjectionHead
from stexp.models.losses import info_nce
from stexp.models.mclstexp import SpotEncoder
from stexp.models.retrieval import ReferenceIndex, retrieve
from stexp.runs.provenance import git_state, now, versions

N_GENES, IMAGE_PX, TILE_PX, FOLD_K = 785, 4000, 224, 100  # small folds have no 200 references
N_QUERIES, N_REFERENCES, N_GENES_OF_MANY, K = 346, 11_200, 256, 200


def write_data(folder: Path, n_sections: int, n_spots: int, image_px: int = IMAGE_PX) -> None:
    """A sample sheet and its files, after HER2+: images of 4,000 px, a square array, 785 genes."""
    genes = [f"GENE{i:03}" for i in range(N_GENES)]
    (folder / "panel.txt").write_text("\n".join(genes) + "\n")
    side = int(np.ceil(np.sqrt(n_spots)))

    def write_section(seed: int) -> tuple:
        name, rng = f"S{seed:02}", np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(90, 255, (image_px // 16, image_px // 16, 3), dtype=np.uint8))
        image = np.asarray(coarse.resize((image_px, image_px), Image.Resampling.BICUBIC))
        image = np.clip(image + rng.integers(-12, 13, image.shape, dtype=np.int16), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{name}.jpg", quality=90)
        x, y = (n.ravel()[:n_spots] for n in np.mgrid[:side, :side])
        spots = pd.DataFrame({"array_x": x, "array_y": y}, index=[f"{i}x{j}" for i, j in zip(x, y, strict=True)])
        spots["pixel_x"], spots["pixel_y"] = ((n + 0.5) * image_px / side for n in (x, y))
        spots.to_csv(folder / f"{name}.csv")
        counts = pd.DataFrame(rng.negative_binomial(1, 0.2, (n_spots, N_GENES)), index=spots.index, columns=genes)
        counts.to_csv(folder / f"{name}.tsv.gz", sep="\t")
        return name, name, f"{name}.jpg", f"{name}.tsv.gz", f"{name}.csv", 1.0

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(write_section, range(n_sections)))
    pd.DataFrame(rows, columns=list(samplesheet.COLUMNS)).to_csv(folder / "sheet.csv", index=False)


class Side:
    """One side of a comparison, running `job` in a process of its own whenever it is asked to."""

    def __init__(self, job: str, **spec: object) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        command = [sys.executable, __file__, "--worker", json.dumps({"job": job, **spec})]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.log, text=True)

    def turn(self, steps: int = 1) -> float:
        print(steps, file=self.process.stdin, flush=True)
        return self._hear()["seconds"] / steps

    def close(self) -> dict:  # its peak memory and what else it has to tell
        self.process.stdin.close()
        told = self._hear()
        self.process.wait()
        return told

    def _hear(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            sys.exit(f"a side of the benchmark ended early:\n{self.log.read()[-4000:]}")
        return json.loads(line)


def work(spec: dict) -> None:
    """Run one side. It answers on what was stdout; prints of others go to stderr."""
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    synchronise = torch.cuda.synchronize if spec["device"] == "cuda" else lambda: None

    def turns() -> Iterator[int]:
        """Steps to take, as they are asked for; the time until the next is taken from here is answered."""
        for line in sys.stdin:
            synchronise()
            start = time.perf_counter()
            yield int(line)
            synchronise()
            answer.write(json.dumps({"seconds": time.perf_counter() - start}) + "\n")

    if spec["allocator"]:
        hardware.keep_freed_memory()
    pl.seed_everything(0, verbose=False)
    told = globals()[spec["job"]](spec, turns()) or {}
    answer.write(json.dumps({**told, **hardware.peak_memory()}) + "\n")


def _config(spec: dict) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        chosen = ["data=her2st", "protocol=paper", "image_encoder.pretrained=false"]
        sizes = [f"data.batch_size={spec['batch']}", f"trainer.max_epochs={spec['epochs']}", f"model.k={spec['k']}"]
        paths = [f"data.panel_file={spec['data']}/panel.txt", f"data.cache_dir={spec['scratch']}/cache"]
        run = [f"output_dir={spec['scratch']}/run", f"trainer={'gpu' if spec['device'] == 'cuda' else 'cpu'}"]
        return compose("train", [*chosen, *sizes, *paths, *run, f"hardware.keep_memory={spec['allocator']}"])


def _ours(spec: dict) -> tuple[DictConfig, pl.LightningDataModule, pl.LightningModule, str]:
    """Config, data, model and precision, as ``stexp.cli.train`` makes them."""
    cfg, sections = _config(spec), samplesheet.read_samplesheet(f"{spec['data']}/sheet.csv")
    data = dataset_of(cfg).serve(sections, build(cfg.protocol), sections[-1].name, cfg.seed)
    data.setup()
    arguments = {key: value for key, value in to_plain(cfg.model).items() if key != "name"}
    model = build(arguments, n_genes=len(data.panel), n_positions=data.array_size)
    if cfg.hardware.channels_last:
        model.image_encoder.to(memory_format=torch.channels_last)
    return cfg, data, model, hardware.choose_precision(cfg.hardware.precision, spec["device"])


class _Turns(pl.Callback):
    def __init__(self, turns: Iterator[int]) -> None:
        self.turns, self.left = turns, 0  # of the steps asked for; at 0 the trainer is held

    def on_train_batch_start(self, trainer: pl.Trainer, model: pl.LightningModule, batch, batch_idx: int) -> None:
        if self.left == 0:
            self.left = next(self.turns, 0)
        trainer.should_stop = self.left == 0
        self.left -= 1


def train_ours(spec: dict, turns: Iterator[int]) -> None:
    """Training as stexp-train runs it: tiles from their store, augmentation, step, Adam, log, checkpoint."""
    cfg, data, model, precision = _ours({**spec, "epochs": 100_000})
    parts = {"callbacks": [*build(cfg.callbacks).values(), _Turns(turns)], "logger": build(cfg.logger)}
    trainer = build(
        cfg.trainer, precision=precision, default_root_dir=spec["scratch"], enable_progress_bar=False, **parts
    )
    trainer.fit(model, datamodule=data)


def train_bare(spec: dict, turns: Iterator[int]) -> None:
    """The image encoder alone, forward and backward on one random batch, with ours' precision and format."""
    _, _, model, precision = _ours(spec)
    encoder = model.image_encoder.to(spec["device"])
    image = torch.rand(spec["batch"], 3, TILE_PX, TILE_PX, device=spec["device"]).to(memory_format=torch.channels_last)
    for steps in turns:
        for _ in range(steps):
            encoder.zero_grad()
            with torch.autocast(spec["device"], torch.bfloat16, enabled=precision == "bf16-mixed"):
                features = encoder(image)
            features.float().square().mean().backward()


def fold_ours(spec: dict, turns: Iterator[int]) -> dict:
    """A fold by ``stexp.cli.fold.train``: besides the scores it makes floors, ceilings, audit and report."""
    for _ in turns:
        sections = samplesheet.read_samplesheet(f"{spec['data']}/sheet.csv")
        train(_config(spec), sections, sections[-1].name, Path(spec["scratch"]) / "run")
    return {"stages": json.loads((Path(spec["scratch"]) / "run" / "stages.json").read_text())}


class PlainSpots(Dataset):
    """Tile, expression and position, one spot at a time."""

    def __init__(self, spec: dict, part: slice, augmented: bool) -> None:
        t = torchvision.transforms
        change = [t.ColorJitter(0.5, 0.5, 0.5), t.RandomHorizontalFlip(), t.RandomRotation(180)] if augmented else []
        self.transform = t.Compose([*change, t.ToTensor()])
        self.images, self.spots, expression = {}, [], []
        for path in sorted(Path(spec["data"]).glob("*.jpg"))[part]:
            self.images[path.stem] = Image.open(path).convert("RGB")
            counts = pd.read_csv(path.with_suffix(".tsv.gz"), sep="\t", index_col=0)
            spots = pd.read_csv(path.with_suffix(".csv"), index_col=0).loc[counts.index]
            expression.append(np.log10(1 + 1e4 * counts.div(counts.sum(axis=1), axis=0)))
            self.spots += [(path.stem, *row) for row in spots.itertuples(index=False)]
        self.expression = np.concatenate(expression).astype(np.float32)

    def __len__(self) -> int:
        return len(self.spots)

    def __getitem__(self, i: int) -> dict:
        name, array_x, array_y, x, y = self.spots[i]
        left, top = int(x) - TILE_PX // 2, int(y) - TILE_PX // 2
        tile = self.images[name].crop((left, top, left + TILE_PX, top + TILE_PX))
        return {"image": self.transform(tile), "expression": self.expression[i], "xy": torch.tensor([array_x, array_y])}


class PlainModel(nn.Module):
    """The published sizes; the layers behind the image encoder are ours, so that only the style differs."""

    def __init__(self, spec: dict) -> None:
        super().__init__()
        self.features = torchvision.models.densenet121(weights=None).features
        self.spot_encoder = SpotEncoder(N_GENES, spec["positions"])
        self.image_projection, self.spot_projection = ProjectionHead(1024, 256), ProjectionHead(N_GENES, 256)
        self.device = spec["device"]
        self.adam = torch.optim.Adam(self.to(self.device).parameters(), lr=1e-4, weight_decay=1e-3)

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        batch = {key: value.to(self.device) for key, value in batch.items()}
        image = F.adaptive_avg_pool2d(self.features(batch["image"]), 1).flatten(1)
        spot = self.spot_encoder(batch["expression"][None], batch["xy"][None])[0]
        return self.image_projection(image), self.spot_projection(spot)

    def step(self, batch: dict) -> None:
        loss = info_nce(*self(batch))
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        loss.item()


def train_plain(spec: dict, turns: Iterator[int]) -> None:
    """The same training step in the plain style, loader included."""
    model = PlainModel(spec)
    loader = DataLoader(PlainSpots(spec, slice(-1), True), spec["batch"], shuffle=True, drop_last=True)
    batches = (batch for _ in iter(int, 1) for batch in loader)  # epoch after epoch
    for steps in turns:
        for _ in range(steps):
            model.step(next(batches))


def fold_plain(spec: dict, turns: Iterator[int]) -> None:
    """Train, embed tiles and spots of every section, retrieve query by query, correlate gene by gene."""
    for _ in turns:
        model = PlainModel(spec)
        loader = DataLoader(PlainSpots(spec, slice(-1), True), spec["batch"], shuffle=True)
        for _ in range(spec["epochs"]):
            for batch in loader:
                model.step(batch)
        spots = PlainSpots(spec, slice(None), False)
        model.eval()
        with torch.no_grad():
            pairs = [model(batch) for batch in DataLoader(spots, 32)]
        image, spot = (torch.cat(part).cpu() for part in zip(*pairs, strict=True))
        n = len(loader.dataset)
        predicted = retrieve_plainly(spot[:n], image[n:], spots.expression[:n], FOLD_K)
        np.nanmean([pearsonr(a, b)[0] for a, b in zip(spots.expression[n:].T, predicted.T, strict=True)])


def retrieve_plainly(reference: torch.Tensor, query: torch.Tensor, expression: np.ndarray, k: int) -> np.ndarray:
    """Top k by cosine at once; then, query by query, weights 1 / d^2 of the L1 distance and the weighted mean."""
    top = (F.normalize(query) @ F.normalize(reference).T).topk(k).indices.numpy()
    reference, predicted = reference.numpy(), []
    for i, q in zip(top, query.numpy(), strict=True):
        weight = 1 / np.abs(reference[i] - q).sum(axis=1) ** 2
        predicted.append(np.average(expression[i], axis=0, weights=weight))
    return np.stack(predicted)


def retrieval(spec: dict, turns: Iterator[int]) -> dict:
    """Search and weighted mean, plain or ours; with ``explain`` ours adds spread and origin of each prediction."""
    draws, n = torch.Generator().manual_seed(0), spec["n"]
    shapes = (n, 256), (N_QUERIES, 256), (n, spec["genes"])
    reference, query, expression = (torch.randn(shape, generator=draws).to(spec["device"]) for shape in shapes)
    before, origin = hardware.peak_memory(), np.repeat("a", n)
    for _ in turns:
        if spec["plain"]:
            retrieve_plainly(reference, query, expression.numpy(), K)
        else:
            index = ReferenceIndex(reference, origin, origin)
            retrieve(index, query, expression, K, "l1", "inverse_square", spread=spec["explain"])
    return {"inputs_gb": before["peak_memory_gb"]}


class Bench:
    """The comparisons, their lines and the peaks of their processes."""

    def __init__(self, spec: dict, size: str) -> None:
        self.spec, self.size, self.gpu = spec, size, spec["device"] == "cuda"
        self.lines, self.peaks = [], {}
        print(f"{'':<66}{'ours':>10}{'other':>10}{'ratio':>8}  bound")

    def line(self, name: str, ours: list[float], other: list[float], bound: float | None = None) -> None:
        """Medians of seconds, and of the rounds' ratios other / ours: how many times faster ours is."""
        ratio = median(b / a for a, b in zip(ours, other, strict=True))
        figures = {"ours_s": median(ours), "other_s": median(other), "ratio": ratio, "bound": bound}
        self.lines.append({"name": name, **figures, "rounds": len(ours)})
        verdict = "" if bound is None else f"  >= {bound:g}  {'ok' if ratio >= bound else 'short'}"
        print(f"{name:<66}{median(ours):>8.3f} s{median(other):>8.3f} s{ratio:>8.2f}{verdict}", flush=True)

    def _interleave(
        self, sides: dict[str, Side], what: str, rounds: int, steps: int, warm: int, fewer: Mapping[str, int] = {}
    ) -> dict[str, list[float]]:
        """Seconds a step of every round, by side; `fewer`: steps of a turn of those that are slow."""
        for name, side in sides.items():
            side.turn(min(warm, fewer.get(name, warm)))
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                seconds[name].append(side.turn(fewer.get(name, steps)))
        self.peaks |= {f"{name} {what}": side.close() for name, side in sides.items()}
        return seconds

    def training(self) -> None:
        """(a) the loop against its encoder; (b) its step against a plain one."""
        rounds, steps, warm = {"full": (5, 3, 2), "quick": (2, 2, 1), "dry": (1, 1, 1)}[self.size]
        if self.gpu:
            rounds, steps, warm = 5, 40, 20
        fewer = {"plain": min(steps, 3)}  # its loader takes seconds a step, which a GPU does not shorten
        settings = {"": (True, False)}  # who keeps freed pages: ours and its encoder; the plain side
        if not self.gpu and self.size == "full":
            settings |= {", all keep freed pages": (True, True), ", none keeps them": (False, False)}
        for suffix, (mine, theirs) in settings.items():
            keeps = {"ours": mine, "bare": mine, "plain": theirs}
            sides = {name: Side(f"train_{name}", **self.spec, allocator=kept) for name, kept in keeps.items()}
            seconds = self._interleave(sides, f"training{suffix}", rounds if not suffix else 2, steps, warm, fewer)
            step, near = f"training step{suffix}", 0.95 if self.gpu else 0.9
            self.line(
                f"(a) {step}, against the bare encoder", seconds["ours"], seconds["bare"], None if suffix else near
            )
            fast = 8 if self.gpu else 3 if hardware.cpu_has_bf16() else None
            self.line(
                f"(b) {step}, against the plain style", seconds["ours"], seconds["plain"], None if suffix else fast
            )

    def folds(self) -> None:
        """(c) a fold from files to scores."""
        seconds, stages = {"ours": [], "plain": []}, []
        for i in range(2 if self.size == "full" else 1):
            for name, taken in seconds.items():
                scratch = Path(self.spec["scratch"]) / f"{name}{i}"
                side = Side(f"fold_{name}", **{**self.spec, "scratch": str(scratch)}, allocator=name == "ours")
                taken.append(side.turn())
                self.peaks[f"{name} fold"] = side.close()
            stages.append(self.peaks["ours fold"].pop("stages"))
        what = f"(c) fold of {self.spec['epochs']} epochs"
        self.line(f"{what}, ours with floors and report", seconds["ours"], seconds["plain"])
        alike = ("data", "model", "fit", "predict", "results", "score")
        to_scores = [sum(stage[name] for name in alike) for stage in stages]
        self.line(f"{what}, ours without frozen features and report", to_scores, seconds["plain"], 5)
        self.lines[-1]["stages_s"] = stages[-1]
        print("    stages of ours: " + ", ".join(f"{name} {value:.1f} s" for name, value in stages[-1].items()))

    def retrieval(self) -> None:
        """(d) against a loop over queries, at the size of HER2+ and at a million references."""
        many = {"full": 1_000_000, "quick": 100_000, "dry": 500}[self.size]
        sizes = [(N_REFERENCES, N_GENES, 9, 1), (many, N_GENES_OF_MANY, 3, None)]
        for n, genes, rounds, bound in sizes[1:] if self.size == "dry" else sizes:
            ours = {"n": n, "genes": genes, "plain": False, "explain": False, "allocator": True}
            specs = {"ours": ours, "explained": {**ours, "explain": True}}
            sides = {name: Side("retrieval", **spec, device=self.spec["device"]) for name, spec in specs.items()}
            sides["plain"] = Side("retrieval", **{**ours, "plain": True, "allocator": False}, device="cpu")
            seconds = self._interleave(sides, f"retrieval, {n:,} references", rounds, 1, 1)
            what = f"(d) {N_QUERIES} queries, {n:,} references, {genes} genes"
            self.line(what, seconds["ours"], seconds["plain"], bound)
            self.line(f"{what}, explained", seconds["explained"], seconds["plain"])

    def memory(self) -> None:  # (e)
        print(f"\n{'(e) peak memory, GB':<66}{'process':>10}{'inputs':>10}{'GPU':>8}")
        for name, told in self.peaks.items():
            figures = (told.get(key) for key in ("peak_memory_gb", "inputs_gb", "peak_gpu_memory_gb"))
            print("{:<66}{:>10}{:>10}{:>8}".format(name, *("-" if gb is None else f"{gb:.2f}" for gb in figures)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer rounds, spots and references")
    size.add_argument("--dry", action="store_true", help="next to nothing, to see that it runs; batches of 4")
    parser.add_argument("--parts", default="abcd", help="(a, b) training, (c) folds, (d) retrieval; default abcd")
    parser.add_argument("--batch", type=int, help="spots of a batch; default 32 on a CPU, 128 on a GPU")
    parser.add_argument("--output", type=Path, help="default experiments/results/bench-<device>.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(json.loads(args.worker))
    start, device, gpu = time.perf_counter(), hardware.accelerator_of("auto"), torch.cuda.is_available()
    # whole batches; on a GPU an epoch that is long beside the writing of its checkpoint
    n_sections, n_spots = (16, 346) if gpu else (5, 32) if args.quick else (9, 64)
    image_px, batch = IMAGE_PX, args.batch or (128 if gpu else 32)
    if args.dry:
        n_sections, n_spots, image_px, batch = 3, 8, 800, 4
    chosen = "dry" if args.dry else "quick" if args.quick else "full"
    facts = {
        "command": " ".join(["python", "experiments/bench.py", *sys.argv[1:]]),
        "date": now(),
        "device": device,
        "precision": hardware.choose_precision("auto", device),
        **hardware.describe(),
    }
    facts |= {"threads": torch.get_num_threads(), "batch": batch, "size": chosen}
    facts |= {"fold": f"{n_sections} sections of {n_spots} spots", "versions": versions(), **git_state()}
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    with tempfile.TemporaryDirectory(prefix="stexp-bench-") as scratch:
        write_data(Path(scratch), n_sections, n_spots, image_px)
        spec = {"device": device, "batch": facts["batch"], "epochs": 2 if gpu else 1, "data": scratch}
        spec["positions"] = 64 if args.dry else 65_536  # rows of the plain model's tables
        spec["k"] = min(FOLD_K, (n_sections - 1) * n_spots)
        bench = Bench({**spec, "scratch": scratch}, chosen)
        for letter, part in (("a", bench.training), ("c", bench.folds), ("d", bench.retrieval)):
            if letter in args.parts:
                part()
        bench.memory()
    facts |= {"seconds": round(time.perf_counter() - start, 1), "lines": bench.lines, "peak_memory": bench.peaks}
    output = args.output or Path(__file__).parent / "results" / f"bench-{device}.json"
    output.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"wrote {output} after {facts['seconds']:.0f} s")


if __name__ == "__main__":
    main()
