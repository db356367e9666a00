"""Figures of the paper from finished runs, with the numbers in them; needs no torch."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from omegaconf import OmegaConf

from paper import clusters
from paper.tables import TITLES, TOP, Cells, Result, missing_of, rank_genes, record, score_tables, started
from stexp.config import build, dataset_of
from stexp.data.section import Section
from stexp.errors import InputError
from stexp.evaluation import predictions
from stexp.evaluation.verdict import count
from stexp.reporting import grids
from stexp.reporting.places import Place, places
from stexp.reporting.tables import LOWER_IS_BETTER
from stexp.sweeps.jobs import Job

log = logging.getLogger(__name__)

DPI = 200
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#6a51a3", "#8c6d31", "#636363")
"""Of labels and clusters; the first seven are those of Okabe and Ito, told apart without red or green."""
UNLABELLED = "#d9d9d9"


def genes_on_tissue(cells: Cells) -> Result:
    """Observed and predicted expression of the paper's genes on their sections: Figure S1."""
    out = Result(cells.reference["title"])
    for (data, protocol, label), jobs, title, caption in started(cells, out):
        table = rank_genes(jobs)
        printed = {gene: tuple(at) for gene, at in cells.reference["values"].get(data, {}).items()}
        shown = [gene for gene in printed if gene in table.index]
        shown += [gene for gene in table.index if gene not in printed][: max(0, TOP - len(printed))]
        run_of = {section: job for job in jobs if job.done for section in cells.facts(job)[1]}
        adatas: dict[Path, ad.AnnData] = {}
        panels = []
        grid = [["gene", "section", "Pearson", "paper", "difference", "chosen"]]
        for gene in shown:
            section, paper = printed.get(gene, (None, None))
            chosen = "as in the paper"
            if section not in run_of:
                section, paper, chosen = table.loc[gene, "best_section"], None, "our best section"
            job = run_of[section]
            if job.output_dir not in adatas:
                adatas[job.output_dir] = predictions.read(job.output_dir / "predictions.h5ad", "layers/observed")
            adata = adatas[job.output_dir]
            place = next(place for place in places(adata) if place.name == section)
            both = [np.asarray(adata[place.rows, gene].layers[key]).ravel() for key in ("observed", "predicted")]
            r = float(np.corrcoef(*both)[0, 1]) if min(np.ptp(values) for values in both) > 0 else None
            grid.append([gene, section, grids.number(r), grids.number(paper), _difference(r, paper), chosen])
            what = {"row": jobs[0].model, "label": f"{label}, {gene}", "kind": "method", "gene": gene}
            out.numbers.append(
                record(cells, [job], **what, section=section, metric="pearson", value=r, paper=paper)
                | {"command": cells.command([job]) + f" fold={job.fold}"}
            )
            panels.append((gene, place, both, r, paper))
        caption = [
            "Pearson: of one gene over the spots of one section. The sections were chosen by these very numbers, in "
            "the paper as here: they show the best cases. Colours: 2nd to 98th percentile of each map.",
            *caption,
        ]
        out.parts.append((title, caption, grid, ""))
        out.figures[_file("genes", cells, data, protocol, label)] = _gene_figure(title, panels)
    return out


def _gene_figure(title: str, panels: list[tuple[str, Place, list[np.ndarray], float | None, float | None]]) -> Figure:
    across = 2 if len(panels) > 1 else 1
    down = -(-len(panels) // across)
    tall = max(np.divide(*np.ptp(place.xy, axis=0)[::-1]) for _, place, *_ in panels)
    high = float(np.clip(2.2 * tall, 1.2, 4.5)) + 0.75
    figure = Figure(figsize=(5.6 * across, high * down + 0.4), dpi=DPI, layout="constrained")
    blocks = np.ravel(figure.subfigures(down, across, wspace=0.04, hspace=0.0))
    for block, (gene, place, both, r, paper) in zip(blocks, panels, strict=False):
        beside = "" if paper is None else f" (paper {paper:.3f})"
        text = f"{gene}, section {place.name}: r = {'–' if r is None else f'{r:.3f}'}{beside}"
        block.suptitle(text, fontsize=10, fontweight="bold")
        for ax, what, values in zip(block.subplots(1, 2), ("observed", "predicted"), both, strict=True):
            drawn = draw_spots(ax, place)
            drawn.set(array=values, cmap="magma", clim=np.percentile(values, [2, 98]))
            ax.set_title(what, fontsize=9)
            bar = block.colorbar(drawn, ax=ax, shrink=0.8, aspect=18, pad=0.02)
            bar.ax.tick_params(labelsize=7)
            bar.outline.set_visible(False)
    figure.suptitle(title, fontsize=11)
    return figure


def draw_spots(ax: Axes, place: Place, faint: float = 0.6) -> EllipseCollection:
    """The tissue, paled, and its spots, without colours yet; the part of the slide that has spots."""
    low, high = place.xy.min(axis=0) - 1.5 * place.spacing, place.xy.max(axis=0) + 1.5 * place.spacing
    ax.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), aspect="equal", xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if place.image is not None:
        ax.imshow(place.image, extent=(0, place.size[0], place.size[1], 0), alpha=faint, zorder=0)
    size = np.full(len(place.xy), 0.8 * place.spacing)
    drawn = EllipseCollection(
        size, size, np.zeros(len(size)), units="xy", offsets=place.xy, offset_transform=ax.transData, linewidth=0
    )
    ax.add_collection(drawn)
    return drawn


def correlations(cells: Cells) -> Result:
    """Correlations between genes, observed and predicted, genes in the order of the observed tree: Figure S2."""
    out = Result(cells.reference["title"])
    for (data, protocol, label), jobs, title, caption in started(cells, out):
        genes, both, n = _mean_correlations([job for job in jobs if job.done])
        order = tree_order(both[0])
        upper = np.triu_indices(len(genes), 1)
        r = float(np.corrcoef(both[0][upper], both[1][upper])[0, 1])
        means = [float(matrix[upper].mean()) for matrix in both]
        caption = [
            f"Pearson between genes over the spots of a section, mean over {count(n, 'section')}; {len(genes)} "
            "genes that vary in every section, in both; order: average linkage of 1 − observed correlation.",
            "Predictions that follow one direction, such as depth, correlate all genes: a high mean is no success.",
            *caption,
        ]
        grid = [["", "value", "paper"], ["pairs of genes: Pearson of predicted with observed", f"{r:.3f}", "–"]]
        grid += [[f"mean correlation, {what}", f"{v:.3f}", "–"] for what, v in zip(LAYERS, means, strict=True)]
        facts = {"row": jobs[0].model, "label": f"{label}, pairs of genes", "kind": "method"}
        out.numbers.append(record(cells, jobs, **facts, metric="pearson", value=r, paper=None))
        for what, mean in zip(LAYERS, means, strict=True):
            facts["label"] = f"{label}, mean over pairs of genes, {what}"
            out.numbers.append(record(cells, jobs, **facts, metric="pearson", value=mean, paper=None))
        out.parts.append((title, caption, grid, ""))
        figure = Figure(figsize=(10.4, 5.2), dpi=DPI, layout="constrained")
        for ax, what, matrix in zip(figure.subplots(1, 2), LAYERS, both, strict=True):
            drawn = ax.imshow(matrix[np.ix_(order, order)], vmin=-1, vmax=1, cmap="RdBu_r", interpolation="antialiased")
            ax.set(xticks=[], yticks=[])
            ax.set_title(what, fontsize=10)
        figure.axes[0].set_xlabel(f"{len(genes)} genes", fontsize=9)
        figure.axes[1].set_xlabel(f"the same order; r of all pairs = {r:.3f}", fontsize=9)
        figure.colorbar(drawn, ax=figure.axes, shrink=0.8, aspect=30, label="Pearson between genes")
        figure.suptitle(title, fontsize=11)
        out.figures[_file("correlations", cells, data, protocol, label)] = figure
        names = [genes[i] for i in order]
        out.tables[_file("order", cells, data, protocol, label)] = pd.DataFrame({"gene": names})
    return out


LAYERS = ("observed", "predicted")


def _mean_correlations(jobs: list[Job]) -> tuple[list[str], list[np.ndarray], int]:
    """Genes that vary everywhere, their correlation matrices (observed, predicted), and over how many sections."""
    sections, varying = [], None
    for job in jobs:
        adata = predictions.read(job.output_dir / "predictions.h5ad", "layers/observed", "layers/predicted")
        for place in places(adata):
            values = [np.asarray(adata.layers[key], dtype=np.float64)[place.rows] for key in LAYERS]
            # NaN compares as False: genes that are not measured do not vary
            spread = np.logical_and(*(np.ptp(each, axis=0) > 1e-6 * np.abs(each).max(axis=0) for each in values))
            sections.append((list(adata.var_names), values))
            genes = {gene for gene, varies in zip(adata.var_names, spread, strict=True) if varies}
            varying = genes if varying is None else varying & genes
    names = [gene for gene in sections[0][0] if gene in varying]
    if len(names) < 3:
        raise InputError(f"{len(names)} genes vary in every section, observed and predicted; three would do")
    total = np.zeros((2, len(names), len(names)))
    for genes, values in sections:
        columns = pd.Index(genes).get_indexer(names)
        total += [np.corrcoef(each[:, columns], rowvar=False) for each in values]
    return names, list(total / len(sections)), len(sections)


def tree_order(correlation: np.ndarray) -> np.ndarray:
    """Leaves of the average-linkage tree of 1 - correlation (G, G), turned so that neighbours are alike; (G,)."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distance = squareform(np.clip(1 - correlation, 0, 2), checks=False)
    return leaves_list(linkage(distance, "average", optimal_ordering=len(correlation) <= 1000))


def neighbours(cells: Cells, metric: str, baseline: str | None) -> Result:
    """Scores against the number of neighbours: Figure S4."""
    out = score_tables(cells, metric, baseline)
    shown, groups = cells.reference["metrics"], list(cells.groups().items())
    figure = Figure(figsize=(3.5 * len(shown), 2.6 * len(groups) + 0.5), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(groups), len(shown), squeeze=False)
    for line, ((data, protocol), jobs) in zip(axes, groups, strict=True):
        numbers = pd.DataFrame([n for n in out.numbers if (n["data"], n["protocol"]) == (data, protocol)])
        methods, best = numbers[numbers["kind"] == "method"], cells.reference["best"].get(data)
        methods = methods.assign(k=methods["row"].astype(int)).dropna(subset="value").sort_values("k")
        for ax, name in zip(line, shown, strict=True):
            values = methods[methods["metric"] == name]
            for colour, (label, part) in zip(COLOURS, values.groupby(values["label"].map(_curve)), strict=False):
                text = label or cells.reference["curve"]
                ax.plot(part["k"], part["value"], "o-", color=colour, markersize=4, label=text)
            floors = numbers[(numbers["kind"] == "floor") & (numbers["metric"] == name)].dropna(subset="value")
            if len(floors):
                least = name in LOWER_IS_BETTER
                floor = floors.loc[floors["value"].idxmin() if least else floors["value"].idxmax()]
                ax.axhline(floor["value"], color="#777777", linestyle=":", label="best floor")
                at = {"xy": (1, floor["value"]), "xycoords": ("axes fraction", "data")}
                near = {"xytext": (0, 3), "textcoords": "offset points", "ha": "right", "color": "#555555"}
                ax.annotate(floor["row"], **at, **near, fontsize=8)
            if best is not None:
                ax.axvline(best, color="#d55e00", linestyle="--", linewidth=1, label="the paper's best k")
            ax.margins(y=0.08)
            ax.set_title(f"{data}: {TITLES[name]}", fontsize=10)
            ax.set_xlabel("k", fontsize=9)
            ax.tick_params(labelsize=8)
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(axis="y", color="#eeeeee")
            ax.set_axisbelow(True)
        acg = methods[methods["metric"] == "pearson_acg"]
        if len(acg):
            top = acg.loc[acg["value"].idxmax()]
            what = {"row": "best", "label": "k with the highest ACG", "kind": "method", "metric": "best_k"}
            out.numbers.append(record(cells, jobs, **what, value=float(top["k"]), paper=best))
            paper = "" if best is None else f" (the paper's: {best})"
            title, caption, *rest = next(p for p in out.parts if p[0] == f"{data}, protocol {protocol}")
            sentence = f"Highest ACG at k = {top['k']}{paper}, chosen on the test sections, in the paper as here."
            out.parts[out.parts.index((title, caption, *rest))] = (title, [*caption, sentence], *rest)
    handles, texts = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=len(texts), frameon=False, fontsize=9)
    figure.suptitle("Scores against the number of retrieved neighbours", fontsize=11)
    out.figures["neighbours"] = figure
    return out


def _curve(label: str) -> str:
    """Label of a row without its k."""
    return re.sub(r"k = \d+ ?", "", label)


def clusters_of_sections(cells: Cells) -> Result:
    """Clusters of observed and predicted expression against the pathologist's labels: Figure S3."""
    out = Result(cells.reference["title"])
    for (data, protocol), jobs in cells.groups().items():
        printed = cells.reference["values"].get(data, {})
        run_of: dict[tuple[str, str], Job] = {}
        for job in jobs:
            for section in cells.facts(job)[1] if job.done else ():
                run_of.setdefault((cells.label(job), section), job)
        cfg = OmegaConf.create(dict(jobs[0].settings))
        names = [name for name in printed if any(name in _sections_of(job) for job in jobs)]
        if not names:
            raise InputError(
                f"{data}, protocol {protocol}: no fold holds out {', '.join(printed) or 'what is labelled'}"
            )
        sections = build(OmegaConf.merge(cfg.data.reader, {"sections": names}))
        panel = dataset_of(cfg).panel(build(cfg.protocol))
        order = list(cells.reference["rows"].values())
        labels = list(dict.fromkeys(map(cells.label, jobs)))
        heads = [head for head in order if head in ("observed", *labels)]
        heads += [label for label in labels if label not in heads]
        grid = [["section", "spots", "labels", *(text for head in heads for text in (head, "paper"))]]
        panels = []
        for section in sections:
            log.info("%s: clusters of %s", section.name, ", ".join(heads))
            pathologist = clusters.labels_of(section)
            line = [section.name, str(int((pathologist != "").sum())), str(len(set(pathologist) - {""}))]
            rows: list[tuple[np.ndarray | None, str]] = []
            for head in heads:
                job = run_of.get((head, section.name))
                key = "observed" if head == "observed" else _model_of(jobs, cells, head)
                clustered = _clustered(section, pathologist, head, job, panel)
                paper = printed.get(section.name, {}).get(key, (None, None))
                line += [_pair(clustered[1:]), _pair(paper)]
                text = f"{_pair(clustered[1:])}\n(paper {_pair(paper)})"
                rows.append((clustered[0], text if clustered[0] is not None else ""))
                of = [each for each in jobs if cells.label(each) == head and section.name in _sections_of(each)]
                for metric, value, other in zip(("ari", "nmi"), clustered[1:], paper, strict=True):
                    what = {"row": key, "label": f"{head}, {section.name}", "kind": "method", "metric": metric}
                    number = record(cells, of or jobs, **what, section=section.name, value=value, paper=other)
                    if head == "observed":
                        command = f"stexp-table sweep={cells.name} allow_missing=true"
                        number |= {"command": command, "commit": None, "hours": 0.0, "hardware": None, "seeds": 0}
                        number |= {"cells": 0, "missing_cells": 0, "n_sections": 1}
                    out.numbers.append(number)
            grid.append(line)
            panels.append((section, pathologist, rows))
        caption = [
            f"ARI / NMI of k-means ({clusters.STARTS} starts) on nine principal components with the pathologist's "
            "labels, as many clusters as labels; all spots are clustered, those labelled undetermined not compared.",
            "Observed: ln(1 + 10,000 x share of the panel) per spot, the nearest to the paper's column of all "
            "definitions that were tried (experiments/results/without-images.json).",
            *missing_of(jobs),
        ]
        out.parts.append((f"{data}, protocol {protocol}", caption, grid, ""))
        out.figures[_file("clusters", cells, data, protocol, "")] = _cluster_figure(heads, panels)
    return out


def _clustered(
    section: Section, pathologist: np.ndarray, head: str, job: Job | None, panel: list[str] | None
) -> tuple[np.ndarray | None, float | None, float | None]:
    """Clusters of a section's spots, and ARI and NMI; None without a run."""
    if head == "observed":
        genes = panel or list(section.genes)
        values = clusters.observed(section, genes, clusters.OBSERVED)
    elif job is None:
        return None, None, None
    else:
        adata = predictions.read(job.output_dir / "predictions.h5ad", "layers/predicted", "obs/spot")
        in_section = (adata.obs["section"] == section.name).to_numpy()
        rows = pd.Index(adata.obs["spot"][in_section].astype(str)).get_indexer(section.spots.obs_names)
        if (rows < 0).any():
            raise InputError(f"{job.output_dir} lacks {int((rows < 0).sum())} spots of section {section.name}")
        values = np.asarray(adata.layers["predicted"])[in_section][rows]
    chosen = clusters.OBSERVED
    return clusters.against_labels(values, pathologist, chosen["scale"], chosen["spots"], starts=clusters.STARTS)


def _cluster_figure(heads: list[str], panels: list[tuple[Section, np.ndarray, list]]) -> Figure:
    names = sorted({label for _, pathologist, _ in panels for label in pathologist if label})
    colour = dict(zip(names, COLOURS, strict=False)) | {"": UNLABELLED}
    figure = Figure(figsize=(2.0 * (1 + len(heads)), 2.3 * len(panels) + 0.8), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(panels), 1 + len(heads), squeeze=False)
    for line, (section, pathologist, rows) in zip(axes, panels, strict=True):
        xy = section.xy_px
        place = Place(section.name, np.arange(len(xy)), xy, predictions.spacing(xy), 1.0, section.um_per_px, None, 1.0)
        draw_spots(line[0], place).set(facecolor=[colour[label] for label in pathologist])
        line[0].set_ylabel(section.name, fontsize=11, rotation=0, ha="right", va="center")
        for ax, (clustered, text) in zip(line[1:], rows, strict=True):
            ax.set_title(text, fontsize=8)
            if clustered is None:
                ax.axis("off")
                ax.text(0.5, 0.5, "no run", ha="center", va="center", color="#777777", transform=ax.transAxes)
                continue
            of = clusters.matched(clustered, pathologist)
            draw_spots(ax, place).set(facecolor=[colour[of.get(each, "")] for each in clustered])
    for ax, head in zip(axes[0], ["pathologist", *heads], strict=True):
        ax.set_title("\n".join(filter(None, [head, ax.get_title()])), fontsize=9)
    handles = [
        Line2D([], [], marker="o", linestyle="", color=colour[name], label=name or "undetermined") for name in colour
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize=9)
    figure.suptitle("Clusters in the colour of the label they share most spots with; ARI / NMI", fontsize=10)
    return figure


def _sections_of(job: Job) -> list[str]:
    """Sections that a cell's fold holds out."""
    listed: dict[str, Any] = job.settings["data"]["sections_of"] or {}
    return list(listed.get(job.fold, [job.fold]))


def _model_of(jobs: list[Job], cells: Cells, label: str) -> str:
    return next(job.model for job in jobs if cells.label(job) == label)


def _pair(values: tuple[float | None, ...]) -> str:
    return "–" if values[0] is None else " / ".join(f"{value:.3f}" for value in values)


def _difference(value: float | None, paper: float | None) -> str:
    return "–" if value is None or paper is None else f"{value - paper:+.3f}"


def _file(what: str, cells: Cells, data: str, protocol: str, label: str) -> str:
    """A file's name, with as much as tells it apart."""
    several = len({each for _, _, each in cells.groups(by_label=True)}) > 1
    return "-".join([what, data, protocol, *([label.replace("/", "_").replace(" ", "_")] if label and several else [])])
