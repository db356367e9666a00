"""What the numbers of a run say, in words."""

from __future__ import annotations

from typing import Any


def label(name: str) -> str:
    """A name as it is read: colour_ridge -> colour ridge."""
    return name.replace("_", " ")


def number(value: float | None, digits: int = 3) -> str:
    """Fixed digits; a dash where there is no value."""
    return "–" if value is None else f"{value:.{digits}f}"


def is_oracle(floor: str) -> bool:
    """Whether a floor reads the counts of the test spots; those that do say it in their name."""
    return floor.endswith("_oracle")


def verdict(metrics: dict[str, Any]) -> tuple[str, str, bool]:
    """What the numbers say, in words.

    Returns
    -------
    numbers
        The method's Pearson beside best floor, oracles and ceiling.
    statement
        Which floors it does not beat, on all genes and on the 50 highest.
    beats
        Whether it beats every floor on both; oracles do not count.
    """
    scores, floors, ceiling = metrics["scores"], metrics["floors"], metrics["ceiling"]
    acg, best = scores.get("pearson_acg"), best_floor(metrics)
    parts = [f"Pearson {number(acg)} over {metrics['n_genes']} genes"]
    parts += [f"best floor: {label(best)} {number(floors[best]['pearson_acg'])}"] if best else ["no floor"]
    parts += [f"{label(name)} {number(own.get('pearson_acg'))}" for name, own in floors.items() if is_oracle(name)]
    parts.append(f"counting-noise ceiling {number(ceiling.get('pearson_acg'))}")
    numbers = "; ".join(parts) + "."
    if best is None or acg is None:
        return numbers, "Without a score and a floor nothing can be said about skill.", False

    lost, asked = {}, [("pearson_acg", "all genes"), ("pearson_heg50", "the 50 highest")]
    for score, where in asked if has_more_than_highest(metrics) else asked[:1]:
        own = scores.get(score)
        there = {
            name: values[score]
            for name, values in floors.items()
            if not is_oracle(name) and values.get(score) is not None
        }
        if not there:
            continue
        above = [name for name in sorted(there, key=lambda name: -there[name]) if own is None or there[name] >= own]
        lost[where] = ", ".join(f"{label(name)} ({number(there[name])})" for name in above)
    if not any(lost.values()):
        statement = f"It beats every floor (oracles aside), on {' and on '.join(lost)}."
    else:
        statement = " ".join(
            f"On {where} it does not beat {names}." if names else f"On {where} it beats every floor (oracles aside)."
            for where, names in lost.items()
        )
    pairs = [
        (section["scores"].get("pearson_acg"), section["floors"].get(best, {}).get("pearson_acg"))
        for section in metrics["sections"].values()
    ]
    pairs = [pair for pair in pairs if None not in pair]
    if len(pairs) > 1:
        wins = sum(own > floor for own, floor in pairs)
        statement += f" It is above {label(best)} in {wins} of {len(pairs)} sections."
    return numbers, statement, not any(lost.values())


def best_floor(metrics: dict[str, Any]) -> str | None:
    """Name of the floor with the highest Pearson over all genes, oracles left out."""
    there = {
        name: scores["pearson_acg"]
        for name, scores in metrics["floors"].items()
        if not is_oracle(name) and scores.get("pearson_acg") is not None
    }
    return max(there, key=there.__getitem__, default=None)


def has_more_than_highest(metrics: dict[str, Any]) -> bool:
    """Whether the 50 highest genes are others than all genes."""
    return metrics["n_genes"] > 50
