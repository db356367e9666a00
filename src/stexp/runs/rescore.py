"""Retrieve again from the embeddings of a run: other k, distance, weights, references or genes."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from omegaconf import OmegaConf

from stexp.config import build_data, load_run, load_sections, write_atomically
from stexp.errors import InputError
from stexp.evaluation import predictions
from stexp.evaluation.audit import audit
from stexp.models.retrieval import ReferenceIndex, choose_references, retrieve
from stexp.runs.provenance import command_line, now
from stexp.runs.results import changed_data, write_scored_files

log = logging.getLogger(__name__)

NEEDED = (
    "obs/role",
    "obs/section",
    *(f"obsm/{key}" for key in ("spot_embedding", "image_embedding", "features", "colour")),
)
"""What retrieval reads of ``embeddings.h5ad``."""


def predict_again(run: Path, changes: dict, genes: str | list[str], output_dir: str | None) -> Path:
    """Predict the test spots of a finished run anew, without its encoders.

    Parameters
    ----------
    run
        Run folder of a retrieval method; its data must still be there.
    changes
        Some of ``k``, ``distance``, ``weighting``, ``reference``.
    genes
        ``panel``; ``all``: every gene measured in all references; or names.
    output_dir
        Where the new prediction goes; None: ``<run>/rescored/<what changed>``.

    Returns
    -------
    Path
        A folder with ``predictions.h5ad``, ``floors.h5ad``, ``audit.json`` and the run's ``provenance.json``.

    Raises
    ------
    InputError
        The run kept no embeddings, its data changed, or a gene is not measured in the references.
    """
    if not (run / "embeddings.h5ad").is_file():
        raise InputError(f"{run} has no embeddings.h5ad: it is unfinished, or its method does not retrieve")
    cfg, kept = load_run(run), predictions.read(run / "embeddings.h5ad", *NEEDED)
    before = predictions.read(run / "predictions.h5ad", "uns/stexp/chosen")
    facts = predictions.read_json(run / "audit.json", "facts")["facts"]
    record = predictions.read_json(run / "provenance.json", "command")
    chosen = json.loads(before.uns["stexp"]["chosen"])
    cfg.model = OmegaConf.merge(cfg.model, {"k": chosen["k"]}, changes)
    panel = list(before.var_names)
    protocol = predictions.protocol_of(before)
    sections = load_sections(cfg, protocol)
    changed = changed_data(run, sections)
    if changed:
        raise InputError(f"the data under {cfg.data.root} changed since {run} ({', '.join(changed[:5])}); train again")
    if genes != "panel":
        panel = _panel(genes, [section for section in sections if section.name in set(kept.obs["section"])])
    data = build_data(cfg, sections, protocol, str(cfg.fold), panel=panel)
    if list(data.spots.index) != list(kept.obs_names) or list(data.spots["role"]) != list(kept.obs["role"]):
        raise InputError(f"the spots under {cfg.data.root} are no longer those of {run}; train again")

    embedded = ~np.isnan(kept.obsm["spot_embedding"]).any(axis=1)
    rows = np.flatnonzero(embedded)
    rows = rows[
        choose_references(data.spots.iloc[rows], OmegaConf.to_container(OmegaConf.create([cfg.model.reference]))[0])
    ]
    table = data.spots.iloc[rows]
    index = ReferenceIndex(
        torch.from_numpy(kept.obsm["spot_embedding"][rows]),
        table["section"].to_numpy(str),
        table["patient"].to_numpy(str),
    )
    query = torch.from_numpy(kept.obsm["image_embedding"][data.rows("test")])
    made = retrieve(
        index, query, torch.from_numpy(data.target[rows]), cfg.model.k, cfg.model.distance, cfg.model.weighting
    )
    made = {key: value.numpy() if torch.is_tensor(value) else value for key, value in made.items()}
    made["image_embedding"], made["neighbours"] = query.numpy(), rows[made["neighbours"]]
    made["obs"] = pd.concat([made.get("obs"), before.obs.filter(like="qc_").reset_index(drop=True)], axis=1)

    what = {**changes, **({} if genes == "panel" else {"genes": genes})}
    folder = Path(output_dir) if output_dir else run / "rescored" / _name(what)
    folder.mkdir(parents=True, exist_ok=True)
    log.info(
        "predicted %d spots x %d genes again from %d references (%s)", len(query), len(panel), len(rows), _name(what)
    )
    chosen = {**({} if changes else chosen), "k": cfg.model.k, "rescored_from": run.resolve().name, "changed": what}
    write_scored_files(folder, cfg, data, made, kept.obsm["features"], kept.obsm["colour"], chosen)
    facts |= {"reference": list(table["section"].unique())}
    if changes:
        facts["k_chosen_on"] = "after_scoring"
    if genes != "panel":
        facts["panel_saw_test"] = []
    write_atomically(folder / "audit.json", json.dumps(audit(protocol, facts), indent=1))
    record |= {"trained_by": record["command"], "command": command_line(), "date": now()}
    write_atomically(folder / "provenance.json", json.dumps(record, indent=1))
    write_atomically(folder / "config.yaml", OmegaConf.to_yaml(cfg))
    return folder


def _panel(genes: str | list[str], sections: list) -> list[str]:
    common = set.intersection(*(set(section.genes) for section in sections))
    if genes == "all":
        return sorted(common)
    names = [genes] if isinstance(genes, str) else [str(name) for name in genes]
    if not names or len(set(names)) < len(names):
        raise InputError("genes names a gene twice, or none; give panel, all, or a list of different genes")
    missing = [name for name in names if name not in common]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(names)} genes are not measured in every section: {', '.join(missing[:5])}"
        )
    return names


def _name(what: dict) -> str:
    """A folder's name: what changed, long lists shortened by a digest that keeps them apart."""
    parts = []
    for key, value in what.items():
        text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
        if len(text) > 40:
            text = f"{text[:24]}..{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"
        parts.append(f"{key}={text}".replace("/", "_"))
    return ",".join(parts) or "same"
