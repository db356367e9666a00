"""Keep results of finished runs, and write the README's table from those kept.

python experiments/results.py add runs/a runs/b    copy what a number needs into experiments/results
python experiments/results.py                      rewrite the table in README.md
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
START, END = "<!-- results: written by experiments/results.py -->", "<!-- end of results -->"
FLOORS = ("colour_ridge", "knn_features", "ridge_features", "depth_oracle")


def add(run: Path) -> Path:
    """Scores, floors, ceiling, audit and provenance of a run, under one name."""
    if not (run / "provenance.json").is_file():
        raise SystemExit(f"{run} is not a finished run: it has no provenance.json")
    metrics, audit, provenance = (
        json.loads((run / f"{name}.json").read_text()) for name in ("metrics", "audit", "provenance")
    )
    if provenance["commit"] is None or provenance["dirty"]:
        raise SystemExit(f"{run} was made from code that no commit holds; commit, then run again")
    kept = {
        key: metrics[key]
        for key in (
            "data",
            "model",
            "protocol",
            "fold",
            "n_spots",
            "n_genes",
            "scores",
            "floors",
            "ceiling",
            "scored_as",
            "chosen",
        )
    }
    kept["sections"] = {name: part["scores"] for name, part in metrics["sections"].items()}
    kept["leaks"] = [item["name"] for item in audit["items"] if item["leak"]]
    # folders of the machine that ran it say nothing to others
    provenance["command"] = re.sub(r"=/\S*/([^/\s]+)", r"=\1", provenance["command"])
    kept["provenance"] = provenance
    path = HERE / "results" / f"{run.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n")
    return path


def table() -> str:
    """Markdown of every kept result, ACG / HEG50, floors beside it."""
    rows = [
        "| run | data, protocol, fold | method | score | "
        + " | ".join(name.replace("_", " ") for name in FLOORS)
        + " | ceiling | leaks |",
        "|---|---|---|---|" + "---|" * (len(FLOORS) + 2),
    ]
    for path in sorted((HERE / "results").glob("*.json")):
        kept = json.loads(path.read_text())
        if "scores" not in kept:
            continue  # a benchmark
        floors = kept["floors"]
        ours, honest = kept["scores"]["pearson_acg"], [floors[f]["pearson_acg"] for f in floors if f != "depth_oracle"]
        cells = [
            _pair(kept["scores"], bold=ours > max(honest)),
            *(_pair(floors.get(name, {})) for name in FLOORS),
            _pair(kept["ceiling"]),
            str(len(kept["leaks"])),
        ]
        rows.append(
            f"| [{path.stem}](experiments/results/{path.name}) | {kept['data']}, {kept['protocol']}, {kept['fold']} | "
            f"{kept['model']} | " + " | ".join(cells) + " |"
        )
    return "\n".join(rows)


def _pair(scores: dict, bold: bool = False) -> str:
    values = [scores.get(key) for key in ("pearson_acg", "pearson_heg50")]
    text = " / ".join("–" if value is None else f"{value:.3f}" for value in values)
    return f"**{text}**" if bold else text


def main(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments) or (arguments and arguments[0] != "add"):
        print(__doc__)
        return
    if arguments:
        for run in arguments[1:]:
            print(f"wrote {add(Path(run))}")
        return
    before, rest = README.read_text().split(START)
    after = rest.split(END)[1]
    README.write_text(f"{before}{START}\n{table()}\n{END}{after}")
    print(f"wrote the results table of {README}")


if __name__ == "__main__":
    main(sys.argv[1:])
