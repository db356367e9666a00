"""Keep what stexp-complete scored, and write the tables of docs/howto/complete.md from what is kept.

python experiments/completion.py add runs/her2st-spots-0.5    every section of a folder of fold=all, into one record
python experiments/completion.py                              rewrite the tables
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import of_paper

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "howto" / "complete.md"
START, END = "<!-- completion: written by experiments/completion.py -->", "<!-- end of completion -->"
OF_SECTION = ("ceiling", "floors", "methods", "settings", "error_on_shown", "difference", "outcome", "map")
KINDS = ("methods", "floors")
SIZES = ("n_spots", "n_spots_shown", "n_spots_asked", "n_genes", "n_genes_shown", "n_genes_asked")


def add(folder: Path) -> Path:
    """The results of all sections of a folder as one record; refused where code was not committed or differs."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*/result.json"))]
    if not results:
        raise SystemExit(f"{folder} holds no folder of a completed section")
    first = results[0]
    provenance = first["provenance"]
    for result in results:
        own = result["provenance"]
        if own["commit"] is None or own["dirty"] or own["commit"] != provenance["commit"]:
            raise SystemExit(f"{folder}: section {result['section']} was made from code that no one commit holds")
    keys = ("data", "known", "pattern", "share", "seed", "reference", "protocol", "image_encoder")
    record: dict[str, Any] = {key: first[key] for key in keys}
    record["completed"] = {
        result["section"]: {key: result[key] for key in (*SIZES, *OF_SECTION) if key in result} for result in results
    }
    seconds = sum(result["provenance"]["seconds"] for result in results)
    manifest = {name: files for result in results for name, files in result["provenance"]["data_manifest"].items()}
    record["provenance"] = {
        **provenance,
        "command": of_paper.elsewhere(provenance["command"]),
        "seconds": round(seconds, 1),
        "stages": {},
        "data_manifest": dict(sorted(manifest.items())),
    }
    path = HERE / "results" / f"completion-{folder.name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def tables() -> str:
    """Markdown: for spots and for genes, a row a method or floor, a column a setting; and what that says."""
    paths = sorted((HERE / "results").glob("completion-*.json"))
    records = [json.loads(path.read_text()) | {"name": path.stem} for path in paths]
    parts = []
    for known in ("spots", "genes"):
        own = [record for record in records if record["known"] == known]
        if own:
            parts += [_table(known, own), "\n".join(f"- {_sentence(record)}" for record in own)]
    return "\n\n".join(parts)


def _setting(record: dict) -> str:
    if record["pattern"] == "grid":
        return "`pattern=grid`"
    share = f"`share={0.1 if record['share'] is None else record['share']:g}`"
    return share if record["pattern"] == "random" else f"`pattern={record['pattern']}` {share}"


def mean_of(record: dict, name: str, score: str) -> float | None:
    """Mean over sections of a floor, a method or the ceiling; None where a section lacks it."""
    sections = record["completed"].values()
    parts = [({**own["floors"], **own["methods"], "ceiling": own["ceiling"]}).get(name, {}) for own in sections]
    values = [part.get(score) for part in parts]
    return None if None in values else sum(values) / len(values)


def best_floor(record: dict) -> str:
    """The floor with the highest mean over sections."""
    floors = next(iter(record["completed"].values()))["floors"]
    return max(floors, key=lambda name: mean_of(record, name, "pearson_acg") or -1)


def _above(record: dict, name: str) -> int:
    """Sections in which a method scores higher than the best floor of the setting."""
    floor = best_floor(record)
    sections = record["completed"].values()
    return sum(
        (own["methods"][name]["pearson_acg"] or 0) > (own["floors"][floor]["pearson_acg"] or 0) for own in sections
    )


def _table(known: str, records: list[dict]) -> str:
    parts = [part for record in records for part in record["completed"].values()]
    methods, floors = (list(dict.fromkeys(name for part in parts for name in part[kind])) for kind in KINDS)

    def cell(record: dict, name: str) -> str:
        values = [mean_of(record, name, score) for score in ("pearson_acg", "pearson_heg50")]
        text = " / ".join("–" if value is None else f"{value:.3f}" for value in values)
        if name not in methods or values[0] is None:
            return text
        floor = mean_of(record, best_floor(record), "pearson_acg") or 0
        return f"{f'**{text}**' if values[0] > floor else text} ({_above(record, name)} of {len(record['completed'])})"

    def worth(name: str) -> float:
        return -sum(mean_of(record, name, "pearson_acg") or 0 for record in records)

    rows = [*sorted(methods, key=worth), *sorted(floors, key=worth), "ceiling"]
    named = {name: name.replace("_", " ") for name in methods}
    named |= {name: f"*floor: {name.replace('_', ' ')}*" for name in floors} | {"ceiling": "*ceiling*"}
    links = [f"[{_setting(own)}](../../experiments/results/{own['name']}.json)" for own in records]
    head = [f"| `known={known}` | {' | '.join(links)} |", f"|---|{'---|' * len(records)}"]
    lines = [f"| {named[name]} | {' | '.join(cell(record, name) for record in records)} |" for name in rows]
    return "\n".join([*head, *lines])


def _sentence(record: dict) -> str:
    """What a setting says of methods and the best floor."""
    floor, n = best_floor(record), len(record["completed"])
    height = mean_of(record, floor, "pearson_acg") or 0
    names = list(next(iter(record["completed"].values()))["methods"])
    above = [name for name in names if (mean_of(record, name, "pearson_acg") or 0) > height]
    always = [name.replace("_", " ") for name in above if _above(record, name) == n]
    rest = [name.replace("_", " ") for name in names if name not in above]
    text = f"`known={record['known']}` {_setting(record)}: the best floor is {floor.replace('_', ' ')} ({height:.3f}). "
    none = f"No method is above it in all {n} sections. "
    text += f"Above it in all {n} sections: {', '.join(always)}. " if always else none
    text += f"No better than it on average: {', '.join(rest)}. " if rest else ""
    best = max(names, key=lambda name: mean_of(record, name, "pearson_acg") or -1)
    depth = [mean_of(record, name, "pearson_given_depth") for name in (best, floor)]
    within = mean_of(record, best, "coverage_95")
    if None not in depth and within is not None:
        name = best.replace("_", " ")
        text += f"Without what a spot's depth explains, {name} has {depth[0]:.3f} and the floor {depth[1]:.3f}; "
        text += f"{within:.1%} of the truth is in the 95 % intervals of {name}."
    return text


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["add"]:
        for folder in arguments[1:]:
            print(f"wrote {add(Path(folder))}")
        return
    if arguments:
        print(__doc__)
        return
    before, rest = PAGE.read_text().split(START)
    PAGE.write_text(f"{before}{START}\n{tables()}\n{END}{rest.split(END)[1]}")
    print(f"wrote the tables of {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
