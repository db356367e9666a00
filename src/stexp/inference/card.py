"""The card of an exported model: what it was made of, what it scored, and where it ends."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from stexp.evaluation.verdict import by_score, count, is_oracle, label, number
from stexp.inference import confidence
from stexp.inference.model_folder import ExportedModel
from stexp.inference.prototype_bank import PrototypeBank

SHOWN = {"pearson_acg": "Pearson, all genes", "pearson_heg50": "Pearson, 50 highest genes"}
"""Scores of the card, as ``metrics.json`` names them."""


def describe(model: ExportedModel, repository: str) -> str:
    """``README.md`` of a repository that holds a model; markdown under a header of yaml, as the hub reads it.

    Parameters
    ----------
    repository
        ``owner/name``, for the lines that load it.
    """
    facts = model.facts
    header = {
        "library_name": "stexp",
        "license": "other",
        "license_name": "see-licences-below",
        "tags": ["spatial-transcriptomics", "histopathology", "gene-expression", "stexp", facts["method"]],
    }
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {_text(facts['method'])}, trained on {_text(facts['data'])}",
        "Predicts spatial gene expression from H&E images. Written by stexp from the model's own record.",
        f'```python\nimport stexp\n\nmodel = stexp.load_model("{repository}")\nadata = model.predict("slide.svs")\n```',
        _about(model),
        "## Scores on held-out sections",
        _scores(facts.get("scores") or []),
        "## Limits",
        _listed(_limits(model)),
        "## Licences",
        _listed(f"{_text(part)}: {_text(licence)}" for part, licence in facts["licences"].items()),
    ]
    return "\n\n".join(parts) + "\n"


def what_is_shared(model: ExportedModel) -> str:
    """What whoever may read a model sees of the data it was trained on; the rest of a sentence."""
    names = f"it names {count(len(_sections(model.facts)), 'section')} of training"
    if model.bank is None:
        return names
    tiles = 0 if model.tiles is None else len(model.tiles.names)
    what = "mean expression of {} prototypes" if isinstance(model.bank, PrototypeBank) else "counts of {} spots"
    counts = f"it holds {what.format(len(model.bank))} x {len(model.bank.genes)} genes"
    return f"{counts}, {count(tiles, 'small tile')} and the names of their sections and patients"


def _about(model: ExportedModel) -> str:
    facts, tile, protocol = model.facts, model.facts["tile"], model.facts["protocol"]
    side = f"{tile['px']} px" + (f" for {tile['um']:g} um" if tile["um"] else " of the image as it is")
    rows = {
        "data": f"{facts['data']}; trained and validated on {', '.join(_sections(facts))}",
        "protocol": f"{protocol['name']}: fold {facts['fold']} was held out by {protocol.get('hold_out', 'patient')}",
        "genes": f"{len(facts['panel'])} trained, {len(model.genes)} predicted",
        "tile": side + (f"; stain normalised ({facts['stain']['method']})" if facts["stain"] else ""),
        "references": _references(model),
        "stexp": f"{facts.get('stexp')}, commit {str(facts['trained'].get('commit'))[:10]}",
        "digest": facts["digest"],
    }
    return _table(["", ""], [[name, value] for name, value in rows.items()])


def _references(model: ExportedModel) -> str:
    if model.bank is None:
        return "none"
    what, k = "prototypes" if isinstance(model.bank, PrototypeBank) else "spots", model.facts["k"]
    return f"{len(model.bank)} {what}" + (f", k = {k}" if k else "")


def _sections(facts: Mapping[str, Any]) -> list[str]:
    of_roles = facts["trained"].get("sections") or {}
    return [str(name) for role in ("train", "validation") for name in of_roles.get(role) or []]


def _scores(runs: Iterable[Mapping[str, Any]]) -> str:
    """A table of every run: the method, its floors by their score, oracles, and the ceiling."""
    tables = []
    for run in runs:
        floors = by_score(run["floors"])
        kinds = [(("oracle" if is_oracle(name) else "floor") + f": {label(name)}", scores) for name, scores in floors]
        rows = [("**this model**", run["scores"]), *kinds, ("ceiling: counting noise", run["ceiling"])]
        cells = [[_text(name, keep="*"), *(number(scores.get(key)) for key in SHOWN)] for name, scores in rows]
        spots = f"{run['n_spots']} spots, {run['n_genes']} genes"
        tables.append(f"Fold {_text(run['fold'])}, protocol {_text(run['protocol'])}: {spots}.")
        tables.append(_table(["", *SHOWN.values()], cells, escaped=True))
    tables.append(
        "A floor is reached without skill in reading tissue; a ceiling is what counting noise allows. A score says "
        "something where it lies above the floors."
        if tables
        else "Not recorded: the model was exported by an earlier stexp."
    )
    return "\n\n".join(tables)


def _limits(model: ExportedModel) -> list[str]:
    facts, genes = model.facts, model.genes
    sections = facts["expected"].get("sections") or []
    below = int((genes["expected_pearson"] <= genes["expected_floor"]).sum()) if "expected_pearson" in genes else 0
    of = int(genes["expected_pearson"].notna().sum()) if "expected_pearson" in genes else 0
    return [
        f"The accuracy to expect of a gene comes from {count(len(sections), 'held-out section')}; on other tissue, "
        f"scanners and stains it is not known.",
        f"{below} of {of} genes that were measured do not beat their best floor (`genes.csv`).",
        *(_text(line.strip()) for line in confidence.lines(dict(facts))),
        "Every prediction carries checks of its slide and a verdict; read them first.",
        "For research: not a medical device.",
    ]


def _listed(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(head: list[str], rows: Iterable[list[str]], escaped: bool = False) -> str:
    cells = [[cell if escaped else _text(cell) for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: object, keep: str = "") -> str:
    """A value of the model as one line of markdown in which nothing is a tag, a link or the end of a cell."""
    line = " ".join(str(value).split())[:500].replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\`*_\[\]|#~!>]", lambda match: match[0] if match[0] in keep else f"\\{match[0]}", line)
