"""``stexp-table sweep=table1``: tables and figures of the paper from the runs of their sweeps; needs no torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from paper.tables import TITLES, Cells, Result, refuse_gaps, score_tables, top_genes
from stexp.config.compose import compose, parse, quoted
from stexp.errors import InputError
from stexp.evaluation.verdict import count
from stexp.files import replacing, write_atomically, write_csv
from stexp.reporting import grids, tables
from stexp.sweeps.jobs import jobs

log = logging.getLogger(__name__)

REFERENCE = Path(__file__).parents[1] / "reference"
SCORES = ("table1", "tableS4", "tableS5", "tableS6", "tableS7")
GENES = ("tableS2", "tableS3")
FIGURES = ("figS1", "figS2", "figS3", "figS4")
BUILT = ("table1", *GENES, *SCORES[1:], *FIGURES)
OWN = ("sweep", "runs", "output_dir", "metric", "baseline", "allow_missing")
"""Keys that are for the table; all others go to the sweep."""


def main(arguments: Sequence[str]) -> None:
    """Build what ``sweep=`` names: one, a list, or ``all``.

    Raises
    ------
    InputError
        A cell without a finished run, unless ``allow_missing=true``.
    """
    own, rest, given = [], [], {}
    for override, text in zip(parse(arguments), arguments, strict=True):
        key = override.get_key_element()
        if key in OWN:
            given[key] = override.value()
            own += [] if key == "sweep" else [text]  # to Hydra this is the name of a folder of configs
        elif key != "dry_run" and not key.startswith("hydra"):
            rest.append(text)
    cfg = compose("table", own)
    names = given["sweep"] if isinstance(given["sweep"], list) else [given["sweep"]]
    names = list(BUILT) if names == ["all"] else names
    unknown = [str(name) for name in names if name not in BUILT]
    if unknown:
        raise InputError(f"sweep={unknown[0]}: choose all, {', '.join(BUILT)}")
    if cfg.metric not in tables.METRICS:
        raise InputError(f"metric={cfg.metric}: choose {', '.join(tables.METRICS)}")
    if len(names) > 1 and cfg.output_dir is not None:
        raise InputError("output_dir is the folder of one table; several go to tables/<name>")
    runs = str(given.get("runs") or "runs")
    for name in names:
        try:
            result, cells = build(name, rest, runs, cfg.metric, cfg.baseline, cfg.allow_missing)
        except InputError as error:
            if len(names) == 1 or not cfg.allow_missing:
                raise
            log.warning("%s is left out: %s", name, error)
            continue
        protocols = sorted({job.protocol for job in cells.jobs})
        folder = Path(
            cfg.output_dir or Path("tables") / (name if protocols == ["paper"] else "-".join([name, *protocols]))
        )
        written = write(result, cells, folder)
        if len(names) == 1:
            print(text_of(result, cells))
        print(f"wrote {', '.join(path.name for path in written)} in {folder}")


def build(
    name: str,
    overrides: Sequence[str] = (),
    runs: str | Path = "runs",
    metric: str = "pearson_acg",
    baseline: str | None = None,
    allow_missing: bool = False,
) -> tuple[Result, Cells]:
    """A table or figure of the paper from the finished runs of its sweep.

    Parameters
    ----------
    name
        One of `BUILT`.
    overrides
        What was given with ``stexp-train -m sweep=<name>``.
    runs
        Folder above the runs, ``output_dir`` of the sweep.
    metric, baseline
        Of the comparisons below the scores.
    allow_missing
        Print gaps as gaps.

    Raises
    ------
    InputError
        A cell has no finished run; or none has.
    """
    cells = Cells(
        name=name,
        overrides=tuple(overrides),
        jobs=jobs(name, [*overrides, f"output_dir={quoted(str(runs))}"]),
        reference=_read(name),
        sizes=_read("tableS1")["values"],
    )
    if not allow_missing:
        refuse_gaps(cells)
    if not any(job.done for job in cells.jobs) and name != "figS3":
        raise InputError(
            f"no cell of {name} has a finished run under {runs}; make them with: {cells.command(cells.jobs)}"
        )
    if name in SCORES:
        result = score_tables(cells, metric, baseline)
    elif name in GENES:
        result = top_genes(cells)
    else:
        from paper import figures as paper_figures  # matplotlib takes its time

        result = {
            "figS1": paper_figures.genes_on_tissue,
            "figS2": paper_figures.correlations,
            "figS3": paper_figures.clusters_of_sections,
            "figS4": lambda cells: paper_figures.neighbours(cells, metric, baseline),
        }[name](cells)
    causes = _read("causes")
    for number in result.numbers:
        number["causes"] = known_causes(number, causes)
    return result, cells


def _read(name: str) -> Any:
    path = REFERENCE / f"{name}.json"
    if not path.is_file():
        raise InputError(f"{path} does not exist: the paper's numbers are in a checkout of stexp, not in its package")
    return json.loads(path.read_text())


def known_causes(number: dict[str, Any], causes: list[dict[str, Any]]) -> list[str]:
    """Why a number may differ from the paper's: sentences of ``causes.json`` whose keys all fit, and sizes."""
    if number.get("kind") != "method":
        return []
    sentences = []
    for cause in causes:
        conditions = {
            key: value if isinstance(value, list) else [value] for key, value in cause.items() if key != "cause"
        }
        if all(number.get(key) in values for key, values in conditions.items()):
            sentences.append(cause["cause"])
    n, of = number["n_sections"], number["paper_sections"]
    by_section = number.get("section") is not None
    if of is not None and n < of and not by_section and number["value"] is not None:
        sentences.insert(0, f"{n} of the paper's {count(of, 'section')}")
    if number["changed"]:
        sentences.insert(0, f"not the published set-up: {number['changed']}")
    return sentences


def text_of(result: Result, cells: Cells) -> str:
    """A table or figure as Markdown."""
    source = cells.reference["source"]
    out = [
        f"# {result.title}",
        f"Paper: {source}. Difference: ours less the paper's. Every number's command, commit "
        "and known causes of a difference: cards.md.",
    ]
    for title, caption, grid, below in result.parts:
        out += [f"## {title}", *caption, *([grids.markdown(grid)] if grid else []), *([below] if below else [])]
    return "\n\n".join(out)


def cards(result: Result, cells: Cells) -> str:
    """Reproduction cards: what every number is, how it is made again, and why it may differ from the paper's."""
    out = [f"# Reproduction cards: {result.title}", f"Paper: {cells.reference['source']}."]
    grouped: dict[tuple, list[dict[str, Any]]] = {}
    for number in result.numbers:
        if number["kind"] == "method":
            grouped.setdefault((number["data"], number["protocol"], number["label"]), []).append(number)
    for (data, protocol, label), numbers in grouped.items():
        first = numbers[0]
        grid = [["", "ours", "paper", "difference"]]
        for number in numbers:
            form = "{:.0f}" if number["metric"] == "best_k" else "{:.4f}"
            shown = [grids.number(number[key], form) for key in ("value", "paper")]
            off = grids.number(number["difference"], form.replace(":", ":+"))
            grid.append([TITLES[number["metric"]], *shown, off])
        made = [count(first["n_sections"], "section")]
        made += [count(first["seeds"], "seed")] if first["seeds"] else []
        made += [f"{first['missing_cells']} of {first['cells']} cells missing"] if first["missing_cells"] else []
        lines = [f"- Of: {', '.join(made)}.", f"- Command: `{first['command']}`"]
        lines += [f"- Commit: {first['commit']}"] if first["commit"] else []
        lines += [f"- Cost: {first['hours']:.2f} h on {first['hardware']}."] if first["hardware"] else []
        causes: dict[str, list[str]] = {}
        for number in numbers:
            for cause in number["causes"]:
                causes.setdefault(cause, []).append(TITLES[number["metric"]])
        for cause, of in causes.items():
            some = f" ({', '.join(of)})" if len(of) < len(numbers) else ""
            lines.append(f"- Known cause{some}: {cause}.")
        if not causes and any(number["difference"] is not None for number in numbers):
            lines.append("- No cause of a difference is known.")
        out += [f"## {label}, {data}, protocol {protocol}", grids.markdown(grid), "\n".join(lines)]
    return "\n\n".join(out)


def write(result: Result, cells: Cells, folder: Path) -> list[Path]:
    """Write Markdown, LaTeX, CSV, cards and figures, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    latex = ["% needs booktabs"]
    for title, caption, grid, _ in result.parts:
        if grid:
            latex.append(grids.latex(grid, f"{result.title}. {title}. {' '.join(caption)}".replace("`", "")))
    texts = {
        "table.md": text_of(result, cells) + "\n",
        "table.tex": "\n\n".join(latex) + "\n",
        "cards.md": cards(result, cells) + "\n",
        "cards.json": json.dumps(result.numbers, indent=1, ensure_ascii=False) + "\n",
    }
    frames = {
        "table": pd.DataFrame(result.numbers).assign(causes=lambda t: t["causes"].map("; ".join)),
        **result.tables,
    }
    for name, part in (("comparison", "comparisons"), ("sections", "sections")):
        parts = [getattr(table, part).assign(table=table.title) for table in result.details]
        parts = [part.dropna(axis="columns", how="all") for part in parts if len(part)]
        if parts:
            frames[name] = pd.concat(parts, ignore_index=True)
    written = []
    for name, content in (texts | {f"{name}.csv": frame for name, frame in frames.items()}).items():
        written.append(folder / name.replace(" ", "_").replace("/", "_"))
        if isinstance(content, str):
            write_atomically(written[-1], content)
        else:
            write_csv(content, written[-1])
    for name, figure in result.figures.items():
        for ending in ("pdf", "png"):
            written.append(folder / f"{name}.{ending}")
            # without the date, the same numbers give the same file
            metadata = {"CreationDate": None} if ending == "pdf" else None
            with replacing(written[-1]) as part:
                figure.savefig(part, format=ending, metadata=metadata)
    return written
