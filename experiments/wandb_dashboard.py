"""Build the W&B dashboard of runs made with logger=wandb: four saved views of a project.

pip install wandb-workspaces
python experiments/wandb_dashboard.py ENTITY/PROJECT                  every run
python experiments/wandb_dashboard.py ENTITY/PROJECT sweep=table1     the runs of one sweep
python experiments/wandb_dashboard.py ENTITY/PROJECT --print          what would be saved, as JSON; no network

Views: scores (the table of runs beside floors and ceiling), folds (how they spread), health (how training went), maps
(genes on tissue, and the tables behind them). Saving adds new views and needs `wandb login`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

try:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
except ImportError:
    raise SystemExit("wandb_workspaces is not installed: pip install wandb-workspaces") from None

SCORES = {"pearson_acg": "Pearson, all genes", "pearson_heg50": "Pearson, 50 highest genes", "mse": "MSE"}
FLOORS = ("colour_ridge", "knn_features", "ridge_features", "depth_oracle")
HEALTH = {
    "train/loss": "Loss",
    "val/pearson": "Pearson on validation spots",
    "health/grad_norm": "Norm of the gradient",
    "health/spots_per_second": "Spots per second",
    "health/gpu_memory_gb": "Peak GPU memory, GB",
}
STEP, CEILING = "trainer/global_step", "ceiling/pearson_acg"


def views(entity: str, project: str, sweep: str | None = None) -> list[ws.Workspace]:
    """The four views; of one sweep, or of all runs."""

    def view(
        name: str, sections: list[ws.Section], *, pinned: Sequence[str] = (), groupby: Sequence[str] = ()
    ) -> ws.Workspace:
        return ws.Workspace(
            entity=entity,
            project=project,
            name=f"{sweep or 'all runs'}: {name}",
            sections=sections,
            settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=100, group_by_prefix="first"),
            runset_settings=ws.RunsetSettings(
                filters=[ws.Metric("Group") == sweep] if sweep else "",
                groupby=[ws.Metric(key) for key in groupby],
                order=[ws.Ordering(ws.Summary("test/pearson_acg"), ascending=False)],
                pinned_columns=list(pinned),
            ),
        )

    columns = ["run:group", "run:jobType", *(f"summary:test/{score}" for score in SCORES)]
    columns += ["summary:test/above_best_floor", *(f"summary:floor/{floor}/pearson_acg" for floor in FLOORS)]
    columns.append(f"summary:{CEILING}")
    return [
        view("scores", [section("Methods", by_method()), section("Floors", beside_floors())], pinned=columns),
        view("folds", [section("Folds", spread())], pinned=("config:fold.value", *columns[1:3]), groupby=("JobType",)),
        view("health", [section("Training", curves())]),
        view("maps", [section("Genes on tissue", maps()), section("Tables", tables())]),
    ]


def section(name: str, panels: list) -> ws.Section:
    layout = ws.SectionLayoutSettings(columns=2, rows=max(1, (len(panels) + 1) // 2))
    return ws.Section(name=name, panels=panels, is_open=True, layout_settings=layout)


def by_method() -> list:
    """A bar for each method, mean over its runs, with their standard deviation."""
    grouped = {"groupby": wr.Metric("JobType"), "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
    return [wr.BarPlot(title=title, metrics=[f"test/{score}"], **grouped) for score, title in SCORES.items()]


def beside_floors() -> list:
    """The method, floors and ceiling of each run, as bars and, for the floors, as constant curves."""
    lines = [*(f"floor/{floor}/pearson_acg" for floor in FLOORS), CEILING]
    return [
        wr.BarPlot(title="Pearson beside floors and ceiling", metrics=["test/pearson_acg", *lines]),
        wr.LinePlot(title="Floors and ceiling of the test spots", x=STEP, y=["test/pearson_acg", *lines]),
        wr.BarPlot(title="Pearson above the best floor", metrics=["test/above_best_floor"]),
    ]


def spread() -> list:
    """Every fold a bar or a point; methods as their range over folds."""
    ranged = {"groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
    of_method, of_fold = ({"groupby": key, **ranged} for key in (wr.Metric("JobType"), wr.Config("fold")))
    return [
        wr.BarPlot(title="Pearson by method, range over folds", metrics=["test/pearson_acg"], **of_method),
        wr.BarPlot(title="Pearson by fold", metrics=["test/pearson_acg"], **of_fold),
        wr.ScatterPlot(
            title="A fold's floor and its score",
            x=wr.SummaryMetric("floor/ridge_features/pearson_acg"),
            y=wr.SummaryMetric("test/pearson_acg"),
        ),
    ]


def curves() -> list:
    return [wr.LinePlot(title=title, x=STEP, y=[name]) for name, title in HEALTH.items()]


def maps() -> list:
    return [wr.MediaBrowser(title="Observed and predicted", media_keys=["gene_maps"], num_columns=2)]


def tables() -> list:
    return [wr.WeavePanelSummaryTable(table_name=name) for name in ("genes", "neighbours")]


def main(arguments: list[str]) -> None:
    show = "--print" in arguments
    given = [argument for argument in arguments if argument != "--print"]
    where = given[0].split("/") if given else []
    rest = given[1:]
    if len(where) != 2 or not all(where) or len(rest) > 1 or not all(a.startswith("sweep=") for a in rest):
        raise SystemExit(__doc__)
    sweep = rest[0].removeprefix("sweep=") if rest else None
    made = views(*where, sweep or None)
    if show:
        models = [view._to_model().model_dump(mode="json", by_alias=True, exclude_none=True) for view in made]
        print(json.dumps(models, indent=1))
        return
    for view in made:
        view.save()


if __name__ == "__main__":
    main(sys.argv[1:])
