"""What of the paper can be computed from counts and positions alone: Table S1, floors of Table 1, Figure S3's observed.

python experiments/without_images.py    writes experiments/results/without-images.json (HER2+ under STEXP_DATA)
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from paper import clusters

from stexp.config import build, dataset_of
from stexp.config.compose import compose
from stexp.evaluation.floors import floors_without_images
from stexp.runs.provenance import command_line, git_state, manifest, now, versions

HERE = Path(__file__).parent
SEEDS = 3


def main() -> None:
    start = time.perf_counter()
    printed = {name: json.loads((HERE / "reference" / f"{name}.json").read_text()) for name in ("tableS1", "figS3")}
    cfg = compose("train", ["data=her2st", "protocol=paper"])
    protocol = build(cfg.protocol)
    sections, panel = dataset_of(cfg).read_sections(protocol), dataset_of(cfg).panel(protocol)
    size = {"sections": len(sections), "spots": sum(map(len, sections)), "genes": len(panel)}
    size["genes_in_every_section"] = sum(all(gene in set(s.genes) for s in sections) for gene in panel)
    seconds = {"read": round(time.perf_counter() - start, 1)}

    floors = floors_without_images(sections, protocol, panel)
    seconds["floors"] = round(time.perf_counter() - start - sum(seconds.values()), 1)

    goal = {name: columns["observed"] for name, columns in printed["figS3"]["values"]["her2st"].items()}
    labelled = [section for section in sections if section.name in goal]
    grid = clusters.search(labelled, panel, goal)
    best = {key: grid.to_dict("records")[0][key] for key in clusters.OBSERVED}
    over_seeds = {section.name: _over_seeds(section, panel, best) for section in labelled}
    seconds["clusters"] = round(time.perf_counter() - start - sum(seconds.values()), 1)

    record = {
        "what": "of HER2+, what needs neither images nor training",
        "tableS1": {"ours": size, "paper": printed["tableS1"]["values"]["her2st"]},
        "floors": floors,
        "figS3_observed": {
            "paper": goal,
            "ours": {name: over_seeds[name][0] for name in goal},
            "definition": best,
            "other_seeds": {name: values[1:] for name, values in over_seeds.items()},
            "starts": clusters.STARTS,
            "grid": grid.round(4).to_dict("records"),
        },
        "provenance": {
            "command": command_line().replace("stexp-without_images", "python experiments/without_images.py"),
            **git_state(),
            "date": now(),
            "seconds": seconds,
            "versions": versions(),
            "data_manifest": manifest(sections),
        },
    }
    path = HERE / "results" / "without-images.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(grid[[*clusters.OBSERVED, "distance"]].to_string())
    print(f"nearest: {best}\n{over_seeds}\nwrote {path}")


def _over_seeds(section, panel: list[str], definition: dict) -> list[tuple[float, float]]:
    values, labels = clusters.observed(section, panel, definition), clusters.labels_of(section)
    options = {"scale": definition["scale"], "spots": definition["spots"]}
    return [clusters.against_labels(values, labels, **options, seed=seed)[1:] for seed in range(SEEDS)]


if __name__ == "__main__":
    main()
