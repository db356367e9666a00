"""Tables of the paper: what stands beside what, what a gap does, and where numbers come from."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from paper import paper
from paper.paper import BUILT, REFERENCE, build, known_causes
from paper.tables import minus_log10_p, rank_genes
from paper_runs import GENES, cells, finish
from scipy.stats import pearsonr

from stexp.errors import InputError
from stexp.sweeps.plan import read_plan, sweep_names

FEW = ("data=her2st", "data.sections=[B3,B4,C2]")
ACG = {"bleep": 0.1, "mclstexp": 0.25}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """BLEEP and mclSTExp on three sections; the section's number is added to a hundredth."""
    for job in cells("table1", tmp_path / "runs", *FEW, "model=bleep,mclstexp"):
        finish(job, ACG[job.model] + int(job.fold[1]) / 100)
    return tmp_path / "runs"


def table1(runs: Path, *more: str, **options) -> pd.DataFrame:
    result, _ = build("table1", [*FEW, "model=bleep,mclstexp", *more], runs, **options)
    return pd.DataFrame(result.numbers)


def test_every_sweep_but_the_search_is_built_and_has_the_papers_numbers():
    assert set(BUILT) == set(sweep_names()) - {"search"}
    for name in BUILT:
        reference, plan = json.loads((REFERENCE / f"{name}.json").read_text()), read_plan(name)
        assert {"title", "source"} <= set(reference)
        if name in paper.SCORES:
            axis = reference["axis"]
            values = list(map(str, {**plan, **plan.get("grid", {}), **plan.get("rescore", {})}[axis]))
            assert set(reference["rows"]) == set(values) and reference["main"] in values
            for data, rows in reference["values"].items():
                assert data in plan["data"] and set(rows) <= set(values)
                assert all(len(row) == len(reference["metrics"]) for row in rows.values())


def test_ours_the_papers_and_the_difference(runs: Path):
    table = table1(runs)
    ours = table[table["kind"] == "method"].set_index(["row", "metric"])
    assert ours.loc[("bleep", "pearson_acg"), "value"] == pytest.approx(0.1 + (3 + 4 + 2) / 300)
    assert ours.loc[("bleep", "pearson_acg"), "paper"] == 0.1873
    assert ours.loc[("mclstexp", "mae"), "difference"] == pytest.approx(0.9 - 0.28 - 0.5813)
    assert (ours["difference"] - (ours["value"] - ours["paper"])).abs().max() < 1e-12
    floors = table[table["kind"] != "method"].set_index(["kind", "row", "metric"])["value"]
    assert floors["floor", "colour ridge", "pearson_heg50"] == pytest.approx(0.225)
    assert floors["oracle", "depth oracle", "pearson_acg"] == pytest.approx(0.6)
    assert floors["ceiling", "counting noise", "pearson_acg"] == pytest.approx(0.8)


def test_rows_are_in_the_papers_order_with_floors_below_and_leaks_beside(runs: Path):
    result, _ = build("table1", [*FEW, "model=bleep,mclstexp"], runs)
    ((title, caption, grid, below),) = result.parts
    assert title == "her2st, protocol paper" and "Audit: same_patient_in_training." in caption
    assert [line[0] for line in grid if line][1:] == [
        *("BLEEP", "**mclSTExp**", "floor: colour ridge", "floor: mean"),
        *("oracle: depth oracle", "ceiling: counting noise"),
    ]
    assert grid[0][1:4] == ["ACG", "paper", "difference"] and grid[0][-2:] == ["floors beaten", "leaks"]
    assert grid[2][1:4] == ["0.2800", "0.2304", "+0.0496"] and grid[2][-2:] == ["2 of 2", "1"]
    assert grid[1][-2:] == ["1 of 2", "1"] and "### ACG by section" in below


def test_a_missing_cell_is_refused_with_the_command_that_makes_it(runs: Path):
    gone = cells("table1", runs, *FEW, "model=mclstexp")[1]
    (gone.output_dir / "metrics.json").unlink()
    with pytest.raises(InputError) as caught:
        table1(runs)
    said = str(caught.value)
    assert "\n" not in said and said.startswith("table1: 1 of 6 cells have no finished run (allow_missing=true")
    assert f"is made by: {gone.typed}; all by: stexp-train -m sweep=table1 data=her2st" in said
    table = table1(runs, allow_missing=True)
    mine = table[(table["row"] == "mclstexp") & (table["metric"] == "mse")].iloc[0]
    # the mean of what is left is no score of the whole
    assert pd.isna(mine["value"]) and mine["paper"] == 0.5897 and mine["missing_cells"] == 1
    whole = table[(table["row"] == "bleep") & (table["metric"] == "mse")].iloc[0]
    assert whole["value"] == pytest.approx(1 - 0.13) and whole["missing_cells"] == 0


def test_without_any_run_there_is_no_table(tmp_path: Path):
    with pytest.raises(InputError, match=r"no cell of table1 has a finished run .*; make them with: stexp-train -m"):
        build("table1", FEW, tmp_path, allow_missing=True)


def test_a_missing_rescoring_names_the_training_first(tmp_path: Path):
    first, *others = cells("tableS6", tmp_path, *FEW)
    with pytest.raises(InputError) as caught:
        build("tableS6", FEW, tmp_path)
    assert f"{first.needs.typed} and then stexp-score run={first.needs.output_dir} model.distance=cosine" in str(
        caught.value
    )
    for job in others:
        finish(job.needs or job)
    with pytest.raises(InputError) as caught:
        build("tableS6", FEW, tmp_path)
    assert f"is made by: stexp-score run={first.needs.output_dir} model.distance=cosine" in str(caught.value)


def test_rescored_cells_are_rows_and_misprinted_rows_have_no_value(tmp_path: Path):
    few = ("data=alex10x", "data.sections=[1142243F,CID4290]")
    for job in cells("tableS6", tmp_path, *few):
        finish(job, {"cosine": 0.1, "l1": 0.2, "l2": 0.3}[job.cell["model.distance"]])
    result, _ = build("tableS6", few, tmp_path)
    table = pd.DataFrame(result.numbers).set_index(["row", "metric"])
    assert table.loc[("l2", "pearson_acg"), ["value", "paper"]].tolist() == [0.3, 0.1948]
    row = table.loc[("l1", "pearson_acg")]
    assert row["value"] == 0.2 and pd.isna(row["paper"]) and pd.isna(row["difference"])
    assert any("repeat rows of Table S4" in cause for cause in row["causes"])


def test_a_card_says_how_the_number_is_made_again_and_why_it_may_differ(runs: Path):
    changed = (*FEW, "model=bleep,mclstexp", "data.cache_dir=x", "trainer.max_epochs=1")
    for job in cells("table1", runs, *changed):
        finish(job)
    result, made_of = build("table1", changed, runs)
    number = next(n for n in result.numbers if n["row"] == "mclstexp" and n["metric"] == "pearson_acg")
    assert number["command"].startswith("stexp-train -m sweep=table1 data=her2st model=mclstexp 'data.sections=[B3,B4")
    assert f"output_dir={runs}" in number["command"]
    assert (number["commit"], number["hours"], number["hardware"]) == ("0123456789", 1.5, "CPU")
    assert number["causes"][:2] == [
        "not the published set-up: trainer.max_epochs=1",
        "3 of the paper's 32 sections",
    ]
    assert any("0.2304 to 0.2322" in cause for cause in number["causes"])
    text = paper.cards(result, made_of)
    assert text.count("\n## ") == 2 and "- Commit: 0123456789" in text and "0.2304" in text


def test_causes_are_those_whose_every_key_fits():
    causes = [
        {"data": "cscc", "row": ["a", "b"], "cause": "one"},
        {"metric": "mse", "cause": "two"},
        {"cause": "three"},
    ]
    number = {"kind": "method", "data": "cscc", "row": "b", "metric": "mse", "value": 1.0, "command": ""}
    number |= {"n_sections": 2, "paper_sections": 2, "changed": ""}
    assert known_causes(number, causes) == ["one", "two", "three"]
    assert known_causes({**number, "row": "c", "n_sections": 1}, causes) == [
        *("1 of the paper's 2 sections", "two", "three")
    ]
    assert known_causes({**number, "kind": "floor"}, causes) == []


def test_p_is_that_of_scipy_and_goes_on_where_it_underflows():
    random = np.random.default_rng(0)
    for n, add in ((3, 1.0), (20, 0.5), (300, 0.3), (5000, 0.01)):
        x = random.normal(size=n)
        y = add * x + random.normal(size=n)
        r, p = pearsonr(x, y)
        assert minus_log10_p(np.array([r, -r]), n) == pytest.approx([-np.log10(p)] * 2, rel=1e-8)
    assert minus_log10_p(np.array([0.0, np.nan]), 50).tolist()[0] == 0
    assert np.isnan(minus_log10_p(np.array([np.nan]), 50)[0])
    # on either side of the smallest double, the same curve
    values = minus_log10_p(np.linspace(0.84, 0.9, 61), 1000)
    steps = np.array([b - a for a, b in pairwise(values)])
    assert values[0] < 290 < values[-1]
    assert (np.diff(minus_log10_p(np.linspace(0.5, 0.99, 99), 2000)) > 0).all()
    assert np.abs(np.diff(steps)).max() < 0.02 * steps.max() and np.isfinite(values).all()


def test_top_genes_are_ranked_by_the_mean_over_sections(runs: Path):
    few = [*FEW, "model=mclstexp"]
    made_of = cells("tableS2", runs, *few)
    table = rank_genes(made_of)
    logs, rs = {gene: [] for gene in GENES}, {}
    for job in made_of:
        adata = ad.read_h5ad(job.output_dir / "predictions.h5ad")
        for i, gene in enumerate(GENES):
            r, p = pearsonr(adata.layers["observed"][:, i].astype(float), adata.layers["predicted"][:, i].astype(float))
            logs[gene].append(-np.log10(p))
            rs[gene, job.fold] = r
    slow = pd.Series({gene: np.mean(values) for gene, values in logs.items()}).sort_values(ascending=False)
    assert table.index.tolist() == slow.index.tolist() and table["rank"].tolist() == list(range(1, len(GENES) + 1))
    np.testing.assert_allclose(table["minus_log10_p"], slow, rtol=1e-5)
    assert table.loc["FN1", "best_section"] == max(("B3", "B4", "C2"), key=lambda section: rs["FN1", section])
    assert set(table["floor_name"]) == {"coordinates"}  # and not the oracle, which is perfect

    result, _ = build("tableS2", few, runs)
    found = {n["gene"]: n for n in result.numbers}
    assert found["GNAS"]["paper"] == 31.74 and found["GNAS"]["value"] == pytest.approx(slow["GNAS"], rel=1e-5)
    assert found["CD74"]["value"] is None  # not predicted here: the paper's number stands alone
    grid = result.parts[0][2]
    assert [line[0] for line in grid[1:9]] == ["GNAS", "FN1", "FASN", "HLA-B", "SCD", "IGKC", "HLA-DRA", "CD74"]


def test_there_is_a_make_target_for_each_and_the_readme_is_what_the_script_writes():
    top = REFERENCE.parents[1]
    line = next(line for line in (top / "Makefile").read_text().splitlines() if line.startswith("PAPER := "))
    assert tuple(line.split()[2:]) == BUILT
    spec = importlib.util.spec_from_file_location("of_paper", top / "experiments" / "of_paper.py")
    of_paper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(of_paper)
    assert of_paper.README.read_text() == of_paper.readme() + "\n"


@pytest.mark.slow
def test_the_command_writes_all_without_torch(runs: Path, tmp_path: Path):
    code = "import sys; from stexp.cli.table import main; main(); assert 'torch' not in sys.modules, 'torch'"
    given = ["sweep=[table1,tableS2,tableS3,figS2]", f"runs={runs}", *FEW, "model=mclstexp", "dry_run=false"]

    def run(*more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code, *given, *more]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = run()
    assert done.returncode == 0, done.stderr
    made = {folder.name: {path.name for path in folder.iterdir()} for folder in (tmp_path / "tables").iterdir()}
    assert set(made) == {"table1", "tableS2", "tableS3", "figS2"}
    assert made["table1"] == {
        *("table.md", "table.tex", "table.csv", "cards.md", "cards.json", "comparison.csv", "sections.csv")
    }
    assert {"correlations-her2st-paper.pdf", "correlations-her2st-paper.png"} <= made["figS2"]
    latex = (tmp_path / "tables" / "table1" / "table.tex").read_text()
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 1 and "0.2304" in latex
    table = pd.read_csv(tmp_path / "tables" / "table1" / "table.csv")
    assert table.loc[table["row"] == "mclstexp", "paper"].tolist() == [0.2304, 0.3866, 0.5897, 0.5813]
