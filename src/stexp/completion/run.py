"""One completion, from a problem to its folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import yaml

from stexp.completion.dense import dense_map
from stexp.completion.methods import FLOORS, METHODS, chosen_methods, complete, what_it_does
from stexp.completion.problem import Problem
from stexp.completion.result import DENSE, PER_GENE, RESULT, about_map
from stexp.completion.score import ceiling, chosen_for_maps, judge, per_gene, score
from stexp.completion.tasks import Completed, SpotTask, relative_error
from stexp.data.section import Section
from stexp.documents import parse_yaml
from stexp.errors import InputError, did_you_mean
from stexp.evaluation.predictions import add_images, make_predictions, write
from stexp.files import write_atomically, write_csv
from stexp.protocol import Protocol
from stexp.runs.folder import differing_keys
from stexp.runs.provenance import Stages, provenance

log = logging.getLogger(__name__)

FILES = (PER_GENE, "shown.csv", "predictions.h5ad", DENSE, RESULT, "report.html")
"""All but the last are written before the report, by which a completion is finished."""
PLACES = ("output_dir", "overwrite", "device", "data.cache_dir")
"""Keys of a config that change no number."""


def claim(folder: Path, config: Mapping[str, Any], overwrite: bool) -> bool:
    """Take a folder for a completion; True where it holds this one, finished.

    Raises
    ------
    InputError
        It holds another completion, or something else.
    """
    path = folder / "config.yaml"
    config = yaml.safe_load(yaml.safe_dump(dict(config), sort_keys=False))
    if path.is_file() and not overwrite:
        try:
            before = parse_yaml(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} cannot be read ({error}); choose another output_dir, or overwrite=true") from None
        before = before if isinstance(before, dict) else {}
        differing = [key for key in sorted(differing_keys(before, config)) if not key.startswith(PLACES)]
        if differing:
            raise InputError(
                f"{folder} holds a run with another config ({', '.join(differing[:5])}); choose another output_dir, or "
                f"overwrite=true to start anew"
            )
        if all((folder / name).is_file() for name in (RESULT, "report.html")):
            return True
    elif not path.is_file() and folder.is_dir() and any(own.name not in (".lock", "logs") for own in folder.iterdir()):
        raise InputError(f"{folder} holds files, but no config.yaml of a completion; choose another output_dir")
    if path.is_file() and _is_of_another_command(path):
        raise InputError(f"{folder} holds a run of another command; choose another output_dir")
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    write_atomically(path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return False


def _is_of_another_command(config: Path) -> bool:
    try:
        return "known" not in (parse_yaml(config.read_text(encoding="utf-8")) or {})
    except ValueError:  # damaged, and written anew as was asked
        return False


def complete_into(
    problem: Problem,
    protocol: Protocol,
    config: Mapping[str, Any],
    sections: list[Section],
    *,
    methods: list[str] | None,
    show: str | None,
    dense: int,
    device: str,
    precision: str,
    stages: Stages,
) -> dict[str, Any]:
    """Complete a section by every floor and method, score what was hidden, and write all but the report.

    Parameters
    ----------
    config
        ``config.yaml``, with ``output_dir``, whose folder is held by the caller.
    sections
        That were read, for the manifest.
    methods
        Names; None: all that the problem allows; none of them: floors alone.
    show
        The floor or method of ``predictions.h5ad`` and the maps; None: the best on what is shown.
    dense
        Places per pitch of the map between the spots; 0: none.
    device, precision
        That features were computed with.

    Returns
    -------
    dict
        ``result.json``.
    """
    folder, known = Path(config["output_dir"]), problem.known
    names = chosen_methods(known, methods, problem.task)
    if show is not None and show not in names:
        raise InputError(f"show={show} is not among what completes: {', '.join(names)}{did_you_mean(show, names)}")
    completed: dict[str, Completed] = {}
    for name in names:
        log.info("%s of section %s: %s", known, problem.section.name, name.replace("_", " "))
        with stages(name):
            completed[name] = complete(known, name, problem.task)
    with stages("score"):
        scores = {name: score(problem.truth, own) for name, own in completed.items()}
        floors = {name: scores[name] for name in names if name in FLOORS[known]}
        own = {name: scores[name] for name in names if name in METHODS[known]}
        of_hidden, of_genes = ceiling(problem.truth, protocol)
        judged = judge(problem, completed, floors, own)
        show = show or chosen_for_maps(problem, completed)
    result = {
        **{key: config[key] for key in ("known", "pattern", "share", "seed", "reference")},
        "data": config["data"]["name"],
        "section": problem.section.name,
        "patient": problem.section.patient,
        "protocol": asdict(protocol),
        "image_encoder": config["image_encoder"]["name"] if problem.has_features else None,
        **sizes(problem),
        "references": problem.references,
        "given": problem.statement(),
        "ceiling": of_hidden,
        "floors": floors,
        "methods": own,
        "notes": {name: what_it_does(known, name) for name in names},
        "settings": {name: each.settings for name, each in completed.items() if each.settings},
        "error_on_shown": {name: _on_shown(problem, each) for name, each in completed.items()},
        "map": show,
        **judged,
    }
    with stages("files"):
        write_csv(per_gene(problem.truth, completed, list(floors), of_genes), folder / PER_GENE)
        write_csv(_shown_table(problem), folder / "shown.csv")
        write(_predictions(problem, completed, show, protocol), folder / "predictions.h5ad")
        if dense and isinstance(problem.task, SpotTask):
            between = dense_map(problem, dense)
            add_images(between, [problem.section])
            write(between, folder / DENSE)
    result["provenance"] = provenance(sections, {}, stages, precision, device)
    write_atomically(folder / RESULT, json.dumps(result, indent=1, allow_nan=False))
    return result


def sizes(problem: Problem) -> dict[str, int]:
    """How many spots and genes are shown and asked for."""
    genes = len(problem.truth.genes)
    if problem.known == "spots":
        n_shown = int(problem.shown.sum())
        return {"n_spots_shown": n_shown, "n_spots_asked": len(problem.truth.rows), "n_genes": genes}
    return {"n_spots": len(problem.section), "n_genes_shown": len(problem.shown_genes), "n_genes_asked": genes}


def _on_shown(problem: Problem, completed: Completed) -> float | None:
    """Error on what is shown while it was held out; of methods that hold out a part, of that part."""
    return relative_error(problem.task, completed.held_out) if np.isfinite(completed.held_out).any() else None


def _shown_table(problem: Problem) -> pd.DataFrame:
    """Which spots, or genes, were shown."""
    if problem.known == "spots":
        return pd.DataFrame({"spot": problem.section.spots.obs_names.astype(str), "shown": problem.shown})
    names = [*problem.shown_genes, *problem.truth.genes]
    return pd.DataFrame({"gene": names, "shown": np.arange(len(names)) < len(problem.shown_genes)})


def _predictions(problem: Problem, completed: Mapping[str, Completed], show: str, protocol: Protocol) -> ad.AnnData:
    """What was asked for, observed and predicted: by one in ``predicted``, by each in a layer of its own."""
    section, truth = problem.section, problem.truth
    spots = section.spots.obs.iloc[truth.rows][["array_x", "array_y"]].copy()
    spots.insert(0, "spot", spots.index.astype(str))
    spots.insert(0, "patient", section.patient)
    spots.insert(0, "section", section.name)
    spots["total_counts"] = truth.total_counts
    spots.index = pd.Index([f"{section.name}:{name}" for name in spots["spot"]])
    adata = make_predictions(
        spots,
        truth.genes,
        observed=truth.observed,
        predicted=completed[show].mean,
        counts=truth.counts,
        xy_px=section.xy_px[truth.rows],
        mean_train=truth.level,
        uncertainty=completed[show].sd,
    )
    for name, own in completed.items():
        adata.layers[f"predicted_{name}"] = own.mean.astype(np.float32)
        adata.layers[f"uncertainty_{name}"] = own.sd.astype(np.float32)
    add_images(adata, [section])
    facts = {"kind": "completion", "known": problem.known, "predicted_by": show}
    adata.uns["stexp"] = facts | {"protocol": json.dumps(asdict(protocol)), "given": problem.statement()}
    return adata


def summary(result: Mapping[str, Any]) -> str:
    """Scores of floors and methods beside the ceiling, and the verdict, for the terminal."""
    asked = (
        f"{result['n_spots_asked']} of {result['n_spots_shown'] + result['n_spots_asked']} spots asked for, "
        f"{result['n_genes']} genes"
        if result["known"] == "spots"
        else f"{result['n_genes_asked']} of {result['n_genes_shown'] + result['n_genes_asked']} genes asked for, "
        f"{result['n_spots']} spots"
    )
    rows = [("floor: " + name, own) for name, own in result["floors"].items()]
    rows += [("> " + name, own) for name, own in result["methods"].items()]
    rows.sort(key=lambda row: -np.inf if row[1]["pearson_acg"] is None else row[1]["pearson_acg"], reverse=True)
    keys = ("pearson_acg", "pearson_heg50", "pearson_given_depth", "mse", "coverage_95")
    lines = [
        f"{result['data']}, section {result['section']}: {asked}; scored on what was asked for alone",
        f"  {'':<28}     ACG   HEG50   depth     MSE  within",
    ]
    for name, scores in [("ceiling: counting noise", result["ceiling"]), *rows]:
        cells = (scores.get(key) for key in keys)
        lines.append(
            f"  {name.replace('_', ' '):<28}"
            + "".join("       -" if cell is None else f"{cell:8.4f}" for cell in cells)
        )
    lines += ["  within: share of the truth inside the stated intervals of 95 %.", result["verdict"], about_map(result)]
    return "\n".join(lines)
