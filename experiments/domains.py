"""Spatial domains on real sections: learned from image and expression together, beside k-means and Leiden.

python experiments/domains.py data=her2st --runs runs/B runs/C    writes experiments/results/domains-<data>.json

Two questions, on different sections where no section has both. Sections with a pathologist's labels: how domains of the
measured expression, as many as there are labels, agree with them. Sections that finished runs of a method with an
image embedding held out: how domains by predicted expression agree over seeds, and with those by measured expression.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from keyed_arguments import parse
from of_paper import elsewhere

from stexp import hardware
from stexp.api.features import machine_of
from stexp.config import build, dataset_of, to_plain
from stexp.config.compose import compose
from stexp.data.genes import normalise
from stexp.evaluation import predictions
from stexp.reporting.domain_comparison import compare_domains
from stexp.runs.provenance import git_state, manifest, now, versions

LABELLED = (("graph", "mixture"), ("expression", "mixture"), ("expression", "kmeans"), ("expression", "leiden"))
IMAGED = (("multimodal", "mixture"), ("graph", "mixture"), ("joint", "mixture"), ("joint", "kmeans"))
IMAGED = (*IMAGED, ("joint", "leiden"), ("expression", "kmeans"), ("image", "kmeans"))
GENES, DOMAINS = 1000, 6
OPTIONS = {"resolution": 1.0, "smooth": True}


def labelled(section, protocol) -> ad.AnnData:
    """Measured expression of the genes with the most counts in a section, and its labels."""
    counts = np.asarray(section.spots.X.sum(axis=0)).ravel()
    most = np.sort(np.argsort(-counts, kind="stable")[:GENES])
    values = normalise(section.spots.X[:, most].toarray(), section.total_counts, protocol)
    obs = pd.DataFrame({"section": section.name, "label": section.spots.obs["label"].astype(object)})
    adata = ad.AnnData(values, obs=obs, var=pd.DataFrame(index=section.genes[most]))
    adata.layers["observed"], adata.obsm["spatial"] = values, section.xy_px
    return adata


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="*", type=Path, default=[])
    args, keys = parse(parser)
    cfg, start = compose("train", keys), time.perf_counter()
    protocol = build(cfg.protocol)
    machine_of(to_plain(cfg)).set_threads()
    sections = dataset_of(cfg).read_sections(protocol)
    tables: dict[str, list[dict]] = {"labelled": [], "held_out": []}
    for section in sections:
        if "label" not in section.spots.obs or not section.spots.obs["label"].notna().any():
            continue
        adata = labelled(section, protocol)
        n = adata.obs["label"].nunique()
        table = compare_domains(adata, adata.obs["label"], LABELLED, n_domains=n, **OPTIONS)
        tables["labelled"] += table.assign(n_labels=n).to_dict("records")
        print(table.to_string())
    for run in args.runs:
        whole = predictions.read(run / "predictions.h5ad")
        for name in whole.obs["section"].unique():
            adata = whole[whole.obs["section"] == name].copy()
            table = compare_domains(adata, None, IMAGED, n_domains=DOMAINS, **OPTIONS)
            tables["held_out"] += table.assign(section=name, n_spots=adata.n_obs).to_dict("records")
            print(name, table.to_string(), sep="\n")
    record = {
        "what": "spatial domains by several ways",
        **{key: [_plain(row) for row in rows] for key, rows in tables.items()},
        "options": {**OPTIONS, "n_domains": DOMAINS, "genes": GENES, "seeds": 3},
        "runs": [elsewhere(json.loads((run / "provenance.json").read_text())["command"]) for run in args.runs],
        "provenance": {
            "command": elsewhere(shlex.join(["python", "experiments/domains.py", *sys.argv[1:]])),
            **git_state(),
            "date": now(),
            "seconds": round(time.perf_counter() - start, 1),
            "hardware": hardware.describe(),
            "versions": versions(),
            "data_manifest": manifest(sections),
        },
    }
    path = Path(__file__).parent / "results" / f"domains-{cfg.data.name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")


def _plain(row: dict) -> dict:
    """Rounded, None for NaN."""
    numbers = {key: round(value, 4) for key, value in row.items() if isinstance(value, float)}
    return {**row, **{key: None if np.isnan(value) else value for key, value in numbers.items()}}


if __name__ == "__main__":
    main()
