"""What experiments/gpu.py measured, as lines: for its summary, and for experiments/README.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
PEAKS = ("peak_memory_gb", "peak_gpu_memory_gb")
NOT_MEASURED, NO_TIME = "not measured", "no time left"

HEAD = """## On a GPU

What only a GPU can tell, by one command that gives itself 7.5 minutes, written for one card (H100 or H200); figures \
are ratios to what stands in the line unless they say otherwise. A line without a measurement says so.

```
experiments/gpu.sh pack gpu-pack --data data --weights densenet121_imagenet.safetensors
experiments/gpu.sh gpu-pack --output measured
python experiments/results.py add measured/gpu-*.json
```

The first line runs where there is a network and the data: it collects the five sections of HER2+ that have images, \
their counts, the encoder and the Python packages that an image with torch lacks ([list of what it is taken to \
have](gpu_image.txt); `--have` names another, such as the machine's `pip freeze`), under 64 MiB with the checkout. The \
second runs on the machine with the GPU, which needs Python 3.12, torch and no network, from a copy of this checkout \
and the folder. It leaves a JSON of every step at once, and ends with an error that names what could not be measured. \
`--steps fold,runs` measures a part, `--minutes` gives another time; `experiments/gpu.sh --dry` goes the same way at \
tiny sizes on the CPU, without a pack."""


class Line(NamedTuple):
    """A measurement as text, and whether it reached what is aimed at."""

    what: str
    value: str
    aim: str = ""
    reached: bool | None = None


AIMS = {
    "train": (
        Line("training step of DenseNet-121, batch 128, against the bare encoder", NOT_MEASURED, ">= 0.95"),
        Line("the same against the published style", NOT_MEASURED, ">= 8"),
    ),
    "fold": (
        Line("fold of 90 epochs, training", NOT_MEASURED, ">= 4,000 tiles/s"),
        Line("fold of 90 epochs, from files to report", NOT_MEASURED, "< 60 s"),
    ),
    "predict-densenet121": (
        Line("tiles of a 60,000 px slide through DenseNet-121, against the bare encoder", NOT_MEASURED, ">= 0.9"),
    ),
    "predict-uni": (Line("the same through a ViT-L (that of UNI) of random weights", NOT_MEASURED, ">= 0.9"),),
    "retrieval": (Line("346 queries among 1,000,000 references, against a loop over queries", NOT_MEASURED),),
}
"""What each step is to measure; the runs beside stand in the tables of scores."""


def lines_of(step: str, facts: dict[str, Any]) -> Iterator[Line]:
    """What a step measured, from its JSON."""
    if step == "fold" and "record" in facts:
        rate, seconds, what = facts["tiles_per_s"], facts["seconds"], f"fold of {facts['epochs']} epochs"
        yield Line(f"{what}, training", f"{rate:,.0f} tiles/s", ">= 4,000", rate >= 4000)
        yield Line(f"{what}, from files to report", f"{seconds:.0f} s", "< 60", seconds < 60)
        yield Line(f"{what}, ACG / HEG50", scores(facts["record"]))
    elif step == "runs":
        yield from (Line(name, scores(kept)) for name, kept in facts["records"].items())
        others = facts["not_measured"]
        yield from (Line(name, why) for name, why in others.items() if why != NO_TIME)
        yield Line("runs for which no time was left", str(sum(why == NO_TIME for why in others.values())))
    elif step.startswith("predict"):
        for line in facts["lines"]:
            rate = f"{line['ours_tiles_per_s']:,.0f} tiles/s of {line['tile_um']:g} um"
            reached = line["ratio"] >= line["bound"]
            yield Line(
                f"{facts['encoder']}, {rate}, against bare", f"{line['ratio']:.2f}", f">= {line['bound']:g}", reached
            )
    else:
        for line in facts.get("lines", []):
            bound = line["bound"]
            reached = None if bound is None else line["ratio"] >= bound
            yield Line(line["name"][4:], f"{line['ratio']:.2f}", "" if bound is None else f">= {bound:g}", reached)


def scores(kept: dict[str, Any]) -> str:
    """ACG and HEG50 of a record."""
    pair = (kept["scores"].get(key) for key in ("pearson_acg", "pearson_heg50"))
    return " / ".join("-" if value is None else f"{value:.3f}" for value in pair)


def peaks_of(step: str, facts: dict[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """Peak memory of every process of a step, in GB."""
    yield from facts.get("peak_memory", {}).items()
    for line in facts.get("lines", []):
        for side, peak in line.get("peak_memory", {}).items():
            yield f"{side}, {step}, tiles of {line['tile_um']:g} um", peak
    for name, kept in facts.get("records", {}).items():
        yield name, kept["provenance"]


def summary(measured: dict[str, dict[str, Any]]) -> str:
    """All steps as text: measured, aim, verdict; then the peaks of memory."""
    rows = ["", f"{'':<80}{'measured':>24}  aim"]
    for step, facts in measured.items():
        if facts["failure"]:
            rows.append(f"{step:<80}{NOT_MEASURED.upper():>24}  {facts['failure']}")
        for what, value, aim, reached in lines_of(step, facts):
            rows.append(f"{what:<80}{value:>24}  {aim}{'' if reached is None else '  ok' if reached else '  SHORT'}")
    rows += ["", f"{'peak memory, GB':<80}{'process':>12}{'GPU':>12}"]
    for step, facts in measured.items():
        for name, peak in peaks_of(step, facts):
            figures = ("-" if peak.get(key) is None else f"{peak[key]:.2f}" for key in PEAKS)
            rows.append("{:<80}{:>12}{:>12}".format(name, *figures))
    return "\n".join(rows)


def readme(folder: Path = HERE / "results") -> str:
    """How to measure on a GPU, and what was, as Markdown."""
    rows = ["| | measured | aim | peak GPU memory | card |", "|---|---|---|---|---|"]
    for step, aims in AIMS.items():
        path = folder / f"gpu-{step}.json"
        if not path.is_file():
            rows += [f"| {line.what} | {line.value} | {line.aim} | | |" for line in aims]
            continue
        facts = json.loads(path.read_text())
        peaks = [peak.get("peak_gpu_memory_gb") or 0 for _, peak in peaks_of(step, facts)]
        card = f"{', '.join(facts['gpu'])} ([record](results/{path.name}))"
        for what, value, aim, reached in lines_of(step, facts):
            short = ", **missed**" if reached is False else ""
            rows.append(f"| {what} | {value} | {aim}{short} | {max(peaks, default=0):.1f} GB | {card} |")
    return "\n\n".join([HEAD, "\n".join(rows)])
