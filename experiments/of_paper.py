"""experiments/README.md: of every table and figure the command, the paper's number, ours and what it cost."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gpu_table

HERE = Path(__file__).parent
README = HERE / "README.md"
SCORES = ("table1", "tableS4", "tableS5", "tableS6", "tableS7")
NOT_RUN = "not run"
HEAD = """# Experiments

Written by `python experiments/results.py` (`make results`) from [reference](reference), the paper's numbers (arXiv \
2407.08216 and its supplement), and [results](results), what was kept of runs here. No number is typed by hand.

`make <name>` downloads, trains what is not trained, and builds the table or figure into `tables/<name>`: Markdown, \
LaTeX, CSV, figures, and for every number a card with its command, commit, difference and known causes. `ARGS=` goes \
to the sweep, `RUNS=` names another folder than `runs`, `DATA=` leaves the download out:

```
make table1 ARGS='trainer=gpu hydra.launcher.jobs_per_gpu=2'
make table1 ARGS='trainer=gpu protocol=strict'
make table1 DATA= ARGS='data=her2st "data.sections=[B4,C2,C3]" model=mclstexp trainer.max_epochs=1'
make tables ARGS=allow_missing=true
```

`python experiments/results.py add tables/table1` keeps a finished one here."""
HOW = """## What needs neither images nor training

[results/without-images.json](results/without-images.json), by `python experiments/without_images.py`: computed from \
the counts and positions of HER2+ alone."""


def add(folder: Path) -> Path:
    """Keep every number of a table or figure of the paper, as ``stexp-table sweep=`` left it."""
    cards = json.loads((folder / "cards.json").read_text())
    commits = [str(card["commit"]) for card in cards if card["value"] is not None and card["row"] != "observed"]
    if not commits or any("None" in commit or "+changes" in commit for commit in commits):
        raise SystemExit(f"{folder} is made from runs of code that no commit holds; commit, then run again")
    cards = elsewhere(cards)
    path = HERE / "results" / f"{folder.name}.json"
    path.write_text(json.dumps({"cards": cards}, indent=1, ensure_ascii=False) + "\n")
    return path


def elsewhere(said: Any) -> Any:
    """Texts in lists and dicts without the folders of the machine they are from, which say nothing to others."""
    if isinstance(said, dict):
        return {key: elsewhere(value) for key, value in said.items()}
    if isinstance(said, list):
        return [elsewhere(value) for value in said]
    return re.sub(r"=/\S*/([^/\s]+)", r"=\1", said) if isinstance(said, str) else said


def readme() -> str:
    """The whole file as Markdown."""
    rows = [["table or figure", "data", "command", "number", "paper", "ours", "difference", "cost"]]
    for name in ("table1", "tableS2", "tableS3", *SCORES[1:], "figS1", "figS2", "figS3", "figS4"):
        rows += _rows(name)
    parts = [HEAD, "## Tables and figures", _markdown(rows), gpu_table.readme()]
    path = HERE / "results" / "without-images.json"
    if path.is_file():
        parts += _without_images(json.loads(path.read_text()))
    return "\n\n".join(parts)


def _read(name: str) -> dict[str, Any]:
    return json.loads((HERE / "reference" / f"{name}.json").read_text())


def _kept(name: str) -> list[dict[str, Any]]:
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text())["cards"] if path.is_file() else []


def _rows(name: str) -> list[list[str]]:
    """One line for each data set: the paper's model, or the first of its genes."""
    reference, out = _read(name), []
    title = reference["title"].partition(":")[0]
    if name in SCORES:
        main = reference["main"]
        for data, rows in reference["values"].items():
            number = f"{reference['rows'][main]}, ACG"
            out.append(_row(name, title, data, number, rows[main][0], {"row": main, "metric": "pearson_acg"}))
    elif name in ("tableS2", "tableS3"):
        for data, genes in reference["values"].items():
            gene, paper = next(iter(genes.items()))
            facts = {"gene": gene, "metric": "minus_log10_p"}
            out.append(_row(name, title, data, f"{gene}, −log10 p", paper, facts, "{:.2f}"))
    elif name == "figS1":
        for gene, (section, paper) in list(reference["values"]["her2st"].items())[:1]:
            facts = {"gene": gene, "section": section}
            out.append(_row(name, title, "her2st", f"{gene} in {section}, Pearson", paper, facts, "{:.3f}"))
    elif name == "figS2":
        for data in ("her2st", "cscc", "alex10x"):
            facts = {"label": "mclSTExp, pairs of genes"}
            out.append(_row(name, title, data, "pairs of genes, Pearson", None, facts, "{:.3f}"))
    elif name == "figS3":
        values = reference["values"]["her2st"]
        paper = sum(columns["mclstexp"][0] for columns in values.values()) / len(values)
        facts = {"row": "mclstexp", "metric": "ari"}
        out.append(_row(name, title, "her2st", "mclSTExp, mean ARI of six", paper, facts, "{:.3f}"))
    else:
        for data, best in reference["best"].items():
            out.append(_row(name, title, data, "best k", best, {"metric": "best_k"}, "{:.0f}"))
    return out


def _row(
    name: str, title: str, data: str, number: str, paper: float | None, facts: dict[str, Any], form: str = "{:.4f}"
) -> list[str]:
    found = [card for card in _kept(name) if card["data"] == data and card["protocol"] == "paper"]
    found = [card for card in found if all(card.get(key) == value for key, value in facts.items())]
    found = [card for card in found if card["value"] is not None]
    ours = sum(card["value"] for card in found) / len(found) if found else None
    texts = ["–" if value is None else form.format(value) for value in (paper, ours)]
    off = "–" if paper is None or ours is None else form.replace(":", ":+").format(ours - paper)
    cost = NOT_RUN
    if found:
        few = {card["changed"] for card in found} - {""}
        sections = f"{found[0]['n_sections']} of {found[0]['paper_sections']} sections"
        cost = f"{found[0]['hours']:.1f} h, {found[0]['hardware']}, {'; '.join([sections, *sorted(few)])}"
    return [title, data, f"`make {name}`", number, *texts, off, cost]


def _without_images(record: dict[str, Any]) -> list[str]:
    size, floors, clusters = record["tableS1"], record["floors"], record["figS3_observed"]
    seconds = record["provenance"]["seconds"]
    counts = [["Table S1, her2st", "paper", "ours"]]
    counts += [[key, f"{size['paper'][key]:,}", f"{size['ours'][key]:,}"] for key in ("sections", "spots", "genes")]
    keys = ("pearson_acg", "pearson_heg50", "mse", "mae")
    table = [["floors of Table 1, her2st", "ACG", "HEG50", "MSE", "MAE"]]
    for name, scores in floors.items():
        cells = ["–" if scores.get(key) is None else f"{scores[key]:.4f}" for key in keys]
        table.append([name.replace("_", " "), *cells])
    printed = _read("table1")["values"]["her2st"]["mclstexp"]
    table.append(["the paper's mclSTExp", *(f"{value:.4f}" for value in printed)])
    sections = [["Figure S3, observed", "ARI paper", "ARI ours", "NMI paper", "NMI ours"]]
    for name, paper in clusters["paper"].items():
        ours = clusters["ours"][name]
        sections.append([name, *(f"{pair[i]:.3f}" for i in (0, 1) for pair in (paper, ours))])
    off = [abs(a - b) for name, p in clusters["paper"].items() for a, b in zip(p, clusters["ours"][name], strict=True)]
    seeds = [
        abs(a - b)
        for name, others in clusters["other_seeds"].items()
        for other in others
        for a, b in zip(other, clusters["ours"][name], strict=True)
    ]
    definition = ", ".join(f"{key} {_plain(value)}" for key, value in clusters["definition"].items())
    nearest = [[*clusters["definition"], "mean distance"]]
    nearest += [
        [*(_plain(line[key]) for key in clusters["definition"]), f"{line['distance']:.3f}"] for line in clusters["grid"]
    ]
    return [
        HOW,
        _markdown(counts),
        _markdown(table),
        _markdown(sections),
        f"Nearest of {len(clusters['grid'])} definitions: {definition}; PCA(9) with the full solver, k-means from "
        f"{clusters['starts']} starts, each ended by moving single spots, lowest sum of squares. Mean distance from "
        f"the printed values {sum(off) / len(off):.3f}, largest {max(off):.3f}; other seeds move a value by at most "
        f"{max(seeds):.4f}. It took {sum(seconds.values()):.0f} s. All definitions:",
        _markdown(nearest),
    ]


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _markdown(rows: list[list[str]]) -> str:
    head, *lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *lines])
