"""Tables of runs, as ``stexp-table`` makes them."""

from __future__ import annotations

from stexp.reporting.tables import Table, by_table, tabulate
from stexp.runs.scored import ScoredRun


def tabulate_all(
    runs: list[ScoredRun], metric: str = "pearson_acg", baseline: str | None = None, allow_missing: bool = False
) -> list[Table]:
    """A table for every data set and protocol among the runs."""
    return [tabulate(title, members, metric, baseline, allow_missing) for title, members in by_table(runs)]
