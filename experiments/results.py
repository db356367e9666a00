"""Keep results of finished runs, and write the tables of docs/results.md from those kept.

python experiments/results.py add runs/a runs/b    copy what a number needs into experiments/results
python experiments/results.py add tables/table1    the same for a table or figure of the paper
python experiments/results.py add gpu-*.json       the same for what experiments/gpu.py measured
python experiments/results.py                      rewrite the tables in docs/results.md, and experiments/README.md
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import ablation_table
import of_paper

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results.md"
OF_SECTIONS = {"pearson_acg": "all genes", "pearson_heg50": "50 highest", "pearson_given_depth": "given depth"}
"""Scores that floors keep of every section."""
SHOWN_EPOCHS = (1, 5, 10, 20, 40)
"""Of a contrastive training, beside the last."""
START, END = "<!-- results: written by experiments/results.py -->", "<!-- end of results -->"


def add(run: Path) -> list[Path]:
    """Scores, floors, ceiling, audit and provenance of a run, or the cards of a table, under one name."""
    if (run / "cards.json").is_file():
        return [of_paper.add(run)]
    if run.suffix == ".json":
        return _add_measured(run)
    if not (run / "provenance.json").is_file():
        raise SystemExit(f"{run} is not a finished run: it has no provenance.json")
    return [_keep(run.name, record(run), run)]


def record(run: Path) -> dict:
    """What is kept of a finished run."""
    metrics, audit, provenance = (
        json.loads((run / f"{name}.json").read_text()) for name in ("metrics", "audit", "provenance")
    )
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
    kept |= of_sections(metrics["sections"])
    kept |= {"intervals": metrics["evidence"]["intervals"], "floor_spread": metrics.get("floor_spread", {})}
    if (run / "contrast.json").is_file():
        kept["contrast"] = json.loads((run / "contrast.json").read_text())["epochs"]
    kept["leaks"] = [item["name"] for item in audit["items"] if item["leak"]]
    provenance["command"] = of_paper.elsewhere(provenance["command"])
    kept["provenance"] = provenance
    return kept


def of_sections(sections: dict[str, dict]) -> dict:
    """Scores of every section, and of its floors those that `OF_SECTIONS` names."""
    return {
        "sections": {name: part["scores"] for name, part in sections.items()},
        "section_floors": {
            name: {floor: {key: scores[key] for key in OF_SECTIONS} for floor, scores in part["floors"].items()}
            for name, part in sections.items()
        },
    }


def _add_measured(path: Path) -> list[Path]:
    """A step of experiments/gpu.py; of its runs, each by itself."""
    facts = json.loads(path.read_text())
    if facts["dry"] or (facts["failure"] and not facts.get("records")):
        raise SystemExit(f"{path} holds no measurement: {facts['failure'] or 'it is of a dry run'}")
    if "records" in facts:
        return [_keep(name, kept, f"{name} of {path}") for name, kept in facts["records"].items()]
    return [_keep(path.stem, facts, path)]


def _keep(name: str, kept: dict, what: object) -> Path:
    provenance = kept.get("provenance", kept)
    if provenance["commit"] is None or provenance["dirty"]:
        raise SystemExit(f"{what} was made from code that no commit holds; commit, then run again")
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n")
    return path


def tables() -> str:
    """Markdown: for every data set, protocol and panel, methods and floors in rows, folds in columns; then sections."""
    kept = [json.loads(path.read_text()) | {"name": path.stem} for path in sorted((HERE / "results").glob("*.json"))]
    runs = [run for run in kept if "scores" in run]  # the others are benchmarks
    groups: dict[str, list[dict]] = {}
    for run in runs:
        panel = re.search(r"data\.panel_file=(\S+)", run["provenance"]["command"])
        title = f"{run['data']}, `protocol={run['protocol']}`" + (f", genes of {panel[1]}" if panel else "")
        groups.setdefault(title, []).append(run)
    ablations, rivals = (
        {each["name"]: each for each in kept if each["name"].startswith(kinds)}
        for kinds in (("ablation-", "control-"), ("rivals-",))
    )
    parts = [*(_table(title, members) for title, members in groups.items()), by_section(runs), sure(runs)]
    parts += [ablation_table.rivals(rivals), learning(runs), references_kept(kept), domains(kept)]
    parts.append(ablation_table.tables(ablations))
    return "\n\n".join(filter(None, parts))


def by_section(runs: list[dict]) -> str:
    """Of records that keep the floors of every section: the method beside the best floor there, oracles aside."""
    rows = []
    for run in runs:
        for section, floors in run.get("section_floors", {}).items():
            cells = []
            for key in OF_SECTIONS:
                own = run["sections"][section][key]
                name, best = max(
                    ((name, scores[key]) for name, scores in floors.items() if not name.endswith("_oracle")),
                    key=lambda floor: floor[1],
                )
                text = f"{own:.3f}" if own <= best else f"**{own:.3f}**"
                cells.append(f"{text}, {best:.3f} ({name.replace('_', ' ')})")
            rows.append(
                f"| [{run['name']}](../experiments/results/{run['name']}.json) | {section} | {' | '.join(cells)} |"
            )
    head = [f"| record | section | {' | '.join(OF_SECTIONS.values())} |", "|---|---|---|---|---|"]
    return "\n".join(["Section by section, the method and the best floor there:", "", *head, *rows])


def sure(runs: list[dict]) -> str:
    """Of records that keep them: the interval of the mean over all genes, and what it is over."""
    rows = []
    for run in runs:
        interval = run.get("intervals", {}).get("pearson_acg")
        if interval:
            over = f"{interval['n_units']} {interval['over']}" if "n_units" in interval else interval["over"]
            rows.append(
                f"| [{run['name']}](../experiments/results/{run['name']}.json) | {run['scores']['pearson_acg']:.3f} | "
                f"{interval['low']:.3f} to {interval['high']:.3f} | {over} |"
            )
    head = ["| record | all genes | 95 % interval | over |", "|---|---|---|---|"]
    return "\n".join(["How sure the mean over all genes is:", "", *head, *rows]) if rows else ""


def learning(runs: list[dict]) -> str:
    """Of records of contrastive trainings: how the loss and the matches go over the epochs."""
    rows = []
    for run in runs:
        epochs = run.get("contrast", [])
        steps = [epoch for epoch in epochs if epoch["epoch"] in SHOWN_EPOCHS or epoch is epochs[-1]]
        name = f"[{run['name']}](../experiments/results/{run['name']}.json)"
        for each in steps:
            cells = (f"{each[key]:.2f}" for key in ("loss", "log_batch"))
            shares = (f"{each[key]:.1%}" for key in ("matched", "chance"))
            rows.append(f"| {name} | {each['epoch']} of {len(epochs)} | {' | '.join([*cells, *shares])} |")
    head = ["| record | epoch | loss | log(batch) | matched | chance |", "|---|---|---|---|---|---|"]
    title = (
        "Contrastive trainings: the loss on training spots beside that of embeddings that carry nothing, log(batch), "
        "and how many tiles are nearest to their own spot in the batch:"
    )
    return "\n".join([title, "", *head, *rows]) if rows else ""


def references_kept(kept: list[dict]) -> str:
    """Of records of experiments/prototypes.py: accuracy, and size of the exported references."""
    rows = []
    for record in kept:
        for way, part in record["table"].items() if record["name"].startswith("prototypes-") else ():
            score, runs = part["pearson_acg"], record["runs"][way]
            searched, size = (sum(run[key] for run in runs.values()) / len(runs) for key in ("references", "bytes"))
            base = "" if "difference" not in score else f"{score['difference']:+.4f}"
            folds = sorted({key.split()[0] for key in runs})
            means = ", ".join(f"{fold} {_mean_of(runs, fold):.3f}" for fold in folds)
            rows.append(
                f"| [{way}](../experiments/results/{record['name']}.json) | {searched:.0f} | {size / 1e6:.1f} | "
                f"{means} | {score['mean']:.4f} | {base} | {part['mse']['mean']:.4f} |"
            )
    head = "| references of mclstexp | searched | MB | all genes, by fold | mean | to all spots | MSE |"
    what = (
        "References kept as spots, as spots selected after training (`stexp-export prototypes=N`), and as prototypes "
        "learned with the encoders (`model.prototypes=N`); searched and MB exported are means:"
    )
    return "\n".join([what, "", head, "|---|---|---|---|---|---|---|", *rows]) if rows else ""


def _mean_of(runs: dict[str, dict], fold: str) -> float:
    """Mean over the seeds and test sections of a fold."""
    of = [run["sections"] for key, run in runs.items() if key.split()[0] == fold]
    values = [scores["pearson_acg"] for sections in of for scores in sections.values()]
    return sum(values) / len(values)


def domains(kept: list[dict]) -> str:
    """Of records of experiments/domains.py: agreement of spatial domains with labels, over seeds, and with observed."""
    parts = []
    for record in kept:
        if not record["name"].startswith("domains-"):
            continue
        link = f"[{record['name']}](../experiments/results/{record['name']}.json)"
        of = {key: [row["section"] for row in record[key]] for key in ("labelled", "held_out")}
        names = {key: ", ".join(dict.fromkeys(sections)) for key, sections in of.items()}
        parts += [
            f"Spatial domains ({link}), means over sections. Measured expression against a pathologist's labels, as "
            f"many domains as labels ({names['labelled']}, which have no image here):",
            "",
            "| domains | method | ARI | NMI | ARI over seeds | best ARI in |",
            "|---|---|---|---|---|---|",
            *_labelled_rows(record["labelled"]),
            "",
            f"Without labels ({names['held_out']}, held out by mclstexp, 6 domains): the adjusted Rand index of three "
            "seeds with each other, and of domains by predicted with those by measured expression:",
            "",
            "| domains | method | over seeds, measured | over seeds, predicted | predicted with measured |",
            "|---|---|---|---|---|",
            *_held_out_rows(record["held_out"]),
        ]
    return "\n".join(parts)


def _by_way(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    out: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        out.setdefault((row["domains"], row["method"]), []).append(row)
    return out


def _average(rows: list[dict], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def _labelled_rows(rows: list[dict]) -> list[str]:
    best: dict[str, tuple[float, tuple[str, str]]] = {}
    for row in rows:
        own = row["ari"], (row["domains"], row["method"])
        best[row["section"]] = max(best.get(row["section"], own), own)
    lines = []
    for way, of in sorted(_by_way(rows).items(), key=lambda item: -_average(item[1], "ari")):
        values = " | ".join(f"{_average(of, key):.3f}" for key in ("ari", "nmi", "over_seeds"))
        wins = sum(leader == way for _, leader in best.values())
        lines.append(f"| {way[0]} | {way[1]} | {values} | {wins} of {len(best)} |")
    return lines


def _held_out_rows(rows: list[dict]) -> list[str]:
    lines = []
    for way, of in _by_way(rows).items():
        measured, predicted = ([row for row in of if row["expression"] == key] for key in ("observed", "predicted"))
        shown = [_average(measured, "over_seeds"), _average(predicted, "over_seeds")]
        shown.append(_average(predicted, "with_observed"))
        lines.append(f"| {way[0]} | {way[1]} | {' | '.join(f'{value:.3f}' for value in shown)} |")
    return lines


def _table(title: str, runs: list[dict]) -> str:
    folds = sorted({run["fold"] for run in runs})
    method: dict[str, dict[str, dict]] = {}
    floors: dict[str, dict[str, dict]] = {}
    best: dict[str, float] = {}
    for run in runs:
        for name, scores in {**run["floors"], "ceiling": run["ceiling"]}.items():
            floors.setdefault(_floor(name, run), {})[run["fold"]] = scores
        # of this run's floors, those that do not read the counts of the test spots
        best[run["name"]] = max(s["pearson_acg"] for name, s in run["floors"].items() if not name.endswith("_oracle"))
        how = run["name"].split("-", 3)[3].removeprefix(run["model"]).strip("-")
        method.setdefault(run["model"] + (f", {how}" if how else ""), {})[run["fold"]] = run
    rows = []
    for label, of in method.items():
        cells = []
        for fold in folds:
            scores = of[fold]["scores"] if fold in of else {}
            cells.append(_pair(scores, fold in of and scores["pearson_acg"] > best[of[fold]["name"]]))
        mean = _mean([of[fold]["scores"] for fold in folds if fold in of], len(folds))
        links = " ".join(f"[{fold}](../experiments/results/{of[fold]['name']}.json)" for fold in folds if fold in of)
        rows.append((0, mean, f"| {label} | {' | '.join(cells)} | {_pair(mean)} | {links} |"))
    for label, of in floors.items():
        if set(of) < set(folds):
            continue  # of an encoder that few runs have
        mean = _mean(list(of.values()), len(folds))
        kind = 3 if label == "ceiling" else 2 if label.endswith("oracle") else 1
        row = {1: f"*floor: {label}*", 2: f"*oracle: {label.removesuffix(' oracle')}*", 3: "*ceiling*"}[kind]
        cells = [_pair(of[fold]) for fold in folds]
        rows.append((kind, mean, f"| {row} | {' | '.join(cells)} | {_pair(mean)} | |"))
    rows.sort(key=lambda row: (row[0], -(row[1].get("pearson_acg") or -1)))
    head = f"| {title}: fold | {' | '.join(folds)} | mean | records |"
    return "\n".join([head, f"|---|{'---|' * (len(folds) + 2)}", *(text for *_, text in rows)])


def _floor(name: str, run: dict) -> str:
    """A floor by what it reads: features of an image encoder, and of consensus wider tiles at several scales."""
    reads = []
    if name.endswith("_features"):
        named = re.findall(r"image_encoder(?:\.name)?=(\w+)", run["provenance"]["command"])
        reads += [encoder for encoder in named if encoder != "timm"]
    if name in ("colour_ridge", "knn_features", "ridge_features", "random_features") and run["model"] == "consensus":
        reads.append("tiles of consensus")
    return name.replace("_", " ") + (f" ({', '.join(reads)})" if reads else "")


def _mean(scores: list[dict], n: int) -> dict:
    """Means over folds; nothing where a fold is missing, since a mean of other folds would not compare."""
    keys = ("pearson_acg", "pearson_heg50")
    whole = len(scores) == n and all(part.get(key) is not None for part in scores for key in keys)
    return {key: sum(part[key] for part in scores) / n for key in keys} if whole else {}


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
            for path in add(Path(run)):
                print(f"wrote {path}")
        return
    before, rest = PAGE.read_text().split(START)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{START}\n{tables()}\n{END}{after}")
    print(f"wrote the results tables of {PAGE}")
    of_paper.README.write_text(of_paper.readme() + "\n")
    print(f"wrote {of_paper.README}")


if __name__ == "__main__":
    main(sys.argv[1:])
