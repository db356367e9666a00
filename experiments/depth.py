"""How much of the scores of finished runs is depth: Pearson, and what is left of it given the counts of the spots.

python experiments/depth.py runs/her2st-paper-B4-stnet runs/her2st-strict-B-stnet
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from stexp import hardware
from stexp.evaluation.floors import ORACLES
from stexp.runs.provenance import git_state, now, versions
from stexp.runs.scoring import score_run

SHOWN = ("pearson_acg", "pearson_given_depth")


def measure(run: Path) -> dict:
    """The method and its best floor by each score, under the run's protocol and under the others."""
    metrics, provenance = score_run(run), json.loads((run / "provenance.json").read_text())
    data = hashlib.sha256(json.dumps(provenance["data_manifest"], sort_keys=True).encode()).hexdigest()
    found = {"model": metrics["model"], "fold": metrics["fold"], "commit": provenance["commit"], "data_manifest": data}
    for name, part in {metrics["protocol"]: metrics, **metrics["scored_as"]}.items():
        floors = {floor: scores for floor, scores in part["floors"].items() if floor not in ORACLES}
        best = {key: max(floors, key=lambda floor, key=key: floors[floor][key]) for key in SHOWN}
        found[f"scored_as_{name}"] = {
            "method": {key: round(part["scores"][key], 4) for key in SHOWN},
            "best_floor": {key: [best[key], round(floors[best[key]][key], 4)] for key in SHOWN},
            "depth_oracle": round(part["floors"]["depth_oracle"]["pearson_acg"], 4),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs; they are scored again")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "depth-her2st.json")
    given = parser.parse_args()
    record = {
        "command": " ".join(["python experiments/depth.py", *(f"runs/{run.name}" for run in given.runs)]),
        **git_state(),
        "date": now(),
        "hardware": hardware.describe(),
        "versions": versions(),
        "runs": {run.name: measure(run) for run in given.runs},
    }
    given.output.write_text(json.dumps(record, indent=1) + "\n")
    for name, run in record["runs"].items():
        for key, part in run.items():
            if key.startswith("scored_as_"):
                shown = "  ".join(f"{part['method'][s]:.3f} ({part['best_floor'][s][1]:.3f})" for s in SHOWN)
                print(f"{name:<40} {key.removeprefix('scored_as_'):<8} {shown}")


if __name__ == "__main__":
    main()
