"""The report: what it embeds, what it says, what it refuses."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from fake_run import write_run

from stexp.cli.report import main
from stexp.errors import InputError
from stexp.evaluation.predictions import CHANGED, digest
from stexp.evaluation.verdict import is_oracle, number, verdict
from stexp.reporting.maps import MISSING, first_gene
from stexp.reporting.plots import score_chart
from stexp.reporting.report import write_report
from stexp.reporting.run_page import FLOORS

HEAD = b"gene,pearson,spearman,mse,mean_observed,heg50,n_sections,ceiling\n"
HOSTILE = "<script>alert(1)</script>"


def page_of(report: Path) -> dict:
    text = report.read_text()
    return json.loads(re.search(r'<script type="application/json" id="page">(.*?)</script>', text, re.DOTALL)[1])


def unpack(report: Path, key: str, dtype: str) -> np.ndarray:
    packed = re.search(rf'<script type="text/plain" id="{key}">(.*?)</script>', report.read_text(), re.DOTALL)[1]
    return np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "x", names=(HOSTILE, 'a"b&c'))
    write_report(folder)
    return folder


@pytest.mark.parametrize("layer", ["observed", "predicted", "uncertainty"])
def test_embedded_arrays_decode_to_the_values(run: Path, layer: str) -> None:
    predictions, report = ad.read_h5ad(run / "predictions.h5ad"), run / "report.html"
    steps = page_of(report)["steps"][layer]
    for number_, section in enumerate(page_of(report)["sections"]):
        values = predictions[predictions.obs["section"] == section["name"]].layers[layer]
        codes = unpack(report, f"{number_}-{layer}", "u1").reshape(values.shape[::-1]).T
        low, high = unpack(report, f"{number_}-{layer}-range", "<f4").reshape(2, -1)
        decoded = np.where(codes == MISSING, np.nan, low + codes / steps * (high - low))
        half_step = (high - low) / steps / 2 + 1e-5
        assert np.array_equal(np.isnan(decoded), np.isnan(values))
        assert (np.nan_to_num(np.abs(decoded - values)) <= np.nan_to_num(half_step)).all()


def test_positions_and_correlations_are_embedded(run: Path) -> None:
    predictions, report = ad.read_h5ad(run / "predictions.h5ad"), run / "report.html"
    first = predictions[predictions.obs["section"] == "B1"]
    assert np.allclose(unpack(report, "0-xy", "<f4").reshape(-1, 2), first.obsm["spatial"], atol=0.01)
    pearson = unpack(report, "0-pearson", "<f4")
    expected = np.corrcoef(first.layers["observed"][:, 5], first.layers["predicted"][:, 5])[0, 1]
    assert pearson[5] == pytest.approx(expected, abs=1e-5)
    assert np.isnan(pearson[2])  # constant there
    assert np.isnan(unpack(report, "1-pearson", "<f4")[1])  # not measured there


def test_names_are_escaped(run: Path) -> None:
    text = (run / "report.html").read_text()
    assert HOSTILE in page_of(run / "report.html")["genes"]
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text  # in the list of genes to search
    assert "<b>\n" not in text.split("Configuration")[1]


def test_one_file_that_asks_for_nothing(run: Path) -> None:
    text = (run / "report.html").read_text()
    assert "default-src 'none'" in text
    assert 'content="light dark"' in text and "prefers-color-scheme: dark" in text
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", text)
    assert "http" not in text.replace("http-equiv", "")
    assert sorted(path.name for path in run.iterdir() if "report" in path.name) == ["report.html"]


@pytest.mark.parametrize(("acg", "colour"), [(0.213, "warn"), (0.18, "bad")])
def test_the_verdict_stands_on_the_page_in_its_colour(tmp_path: Path, acg: float, colour: str) -> None:
    folder = write_run(tmp_path / "x", spots=20, acg=acg, retrieval=False)
    judged = verdict(json.loads((folder / "metrics.json").read_text()))
    text = write_report(folder).read_text()
    assert f'class="verdict {colour}"' in text
    assert judged.numbers in text and judged.statement in text.replace("&#43;", "+")


def test_patients_of_a_run_of_before_are_those_of_its_audit(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x", spots=20, genes=5)
    metrics, audit = (json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "audit"))
    for section in metrics["sections"].values():
        del section["patient"]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "audit.json").write_text(
        json.dumps(audit | {"facts": audit["facts"] | {"patient_of": {"B1": "B", "B2": "C"}}})
    )
    assert "2 sections of 2 patients" in write_report(folder).read_text()


def test_changed_predictions_are_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x", spots=20, genes=5)
    record = json.loads((folder / "provenance.json").read_text())
    predictions = ad.read_h5ad(folder / "predictions.h5ad")
    record["predictions_digest"] = digest(predictions)
    (folder / "provenance.json").write_text(json.dumps(record))
    assert CHANGED not in write_report(folder).read_text()
    predictions.layers["predicted"][0, 0] += 1
    predictions.write_h5ad(folder / "predictions.h5ad")
    assert CHANGED in write_report(folder).read_text()


def test_floors_that_read_the_test_counts_are_told_by_their_name() -> None:
    from stexp.evaluation.floors import ORACLES

    assert ORACLES and all(is_oracle(name) for name in ORACLES)
    assert not any(is_oracle(name) for name in set(FLOORS) - ORACLES)


def test_floors_stand_by_their_score_as_on_the_terminal(run: Path) -> None:
    table = write_report(run).read_text().partition('<table class="scores">')[2].partition("</tbody>")[0]
    rows = re.findall(r'<th scope="row">([a-z ]+?) ?<', table)
    assert rows == [
        *("mclstexp", "depth oracle", "colour ridge", "ridge features", "knn features", "coordinates"),
        *("nearest section", "mean", "ceiling"),
    ]


def test_chart_holds_every_value_and_puts_oracles_last(run: Path) -> None:
    chart = score_chart(json.loads((run / "metrics.json").read_text()), "pearson_acg", "ACG")
    assert [bar.kind for bar in chart.bars] == ["method"] + ["floor"] * 6 + ["oracle"]
    assert [bar.name for bar in chart.bars][1:3] == ["colour_ridge", "ridge_features"]
    values = [v for bar in chart.bars for v in [bar.value, *bar.sections] if v is not None] + [chart.ceiling]
    assert all(0 <= chart.x(v, 100) <= 100 for v in values)
    assert 2 <= len(chart.ticks) <= 7 and number(None) == "–"


def test_a_run_scored_in_one_section_without_image_or_neighbours(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x", sections=("B1",), retrieval=False)
    predictions = ad.read_h5ad(folder / "predictions.h5ad")
    del predictions.uns["spatial"]
    predictions.write_h5ad(folder / "predictions.h5ad")
    (section,) = page_of(write_report(folder))["sections"]
    assert section["image"] is None and section["source"] is None
    assert section["layers"] == ["observed", "predicted"]
    assert 80 < section["spot_px"] < 130  # half of the 240 px pitch


def rewrite(folder: Path, **changed) -> Path:
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | changed))
    return write_report(folder)


@pytest.mark.parametrize("genes", [12, 50, 51])
def test_few_genes_have_no_50_highest_of_their_own(tmp_path: Path, genes: int) -> None:
    folder = write_run(tmp_path / "x", spots=20, genes=genes)
    text = write_report(folder).read_text()
    few = genes <= 50
    assert (f"Pearson HEG50 (all {genes})" in text) == few
    assert text.count("<svg") == (1 if few else 2)
    statement = verdict(json.loads((folder / "metrics.json").read_text())).statement
    assert ("50 highest" in statement) == (not few) and "on all genes" in statement


def test_how_k_was_chosen_is_shown_where_it_was(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x", spots=20, genes=5)
    assert "chosen on validation spots" not in rewrite(folder, chosen={"k": 7}).read_text()
    text = rewrite(folder, chosen={"k": 50, "k_validation_pearson": {"5": 0.1011, "50": 0.1212}}).read_text()
    for words in ("k = 50", "chosen on validation spots", "0.101 at k = 5", "0.121 at 50"):
        assert words in text


def test_following_depth_is_neither_better_nor_worse_the_more_it_is(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "x", spots=20, genes=5)).read_text()
    attributes, heading = re.search(r'<th scope="col"([^>]*)>(Follows depth.*?)</th>', text).groups()
    assert heading == "Follows depth" and "near 0 is best" in attributes
    assert re.search(r">MSE&nbsp;<span[^>]*less is better[^>]*>↓", text)


def test_intervals_of_shares_say_over_what_and_where_they_are_too_narrow(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x", spots=20, genes=5)
    stratum = {"by": "ceiling", "n_genes": 5, "pearson": 0.1, "ceiling": 0.5, "share": 0.2}
    bounds = {"share_low": 0.1, "share_high": 0.3}
    evidence = {
        **{"intervals": {}, "error": {}, "chance": None, "gene_sets": []},
        "structure": {"moran_concordance": None},
        "measurable": {"n_genes": 5, "pearson": 0.1},
        "strata": [
            {**stratum, **bounds, "stratum": "few", "share_over": "patients", "share_covers": 0.75},
            {**stratum, **bounds, "stratum": "many", "share_over": "sections", "share_covers": 0.93},
            {**stratum, **bounds, "stratum": "of before"},
        ],
    }
    text = rewrite(folder, evidence=evidence).read_text()
    cells = {
        name: re.search(rf">{name}</th>.*?0\.100 to 0\.300(.*?)</td>", text)[1] for name in ("few", "many", "of before")
    }
    assert "over patients, covers about 75 %" in cells["few"]
    assert "over sections" in cells["many"] and "covers" not in cells["many"] and cells["of before"] == ""


def test_a_run_retrieved_from_again_says_what_changed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x", spots=20, genes=5)
    assert "retrieved again" not in write_report(folder).read_text()
    changed = {"k": 50, "genes": ["FASN", "<b>", "GNAS", "CD3E", "CD4"]}
    text = rewrite(folder, chosen={"k": 50, "rescored_from": "x", "changed": changed}).read_text()
    said = "k=50, genes=FASN+&lt;b&gt;+GNAS and 2 more"
    assert f"<title>mclstexp on her2st, fold B, {said} · stexp</title>" in text
    assert f"retrieved again with <b>{said}</b> from run <b>x</b>" in text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "per_gene.csv names no gene; score the run again"),
        (HEAD + b"FASN,0.1,0,0,0,0,0,0\n", "per_gene.csv has 1 of 5 genes; score the run again"),
        (HEAD, "per_gene.csv names no gene"),
        (b"\x89HDF\r\n\x00\xff", "per_gene.csv is not a table of numbers"),
        (HEAD + b"FASN,high,0,0,0,0,0,0\n", "per_gene.csv is not a table of numbers"),
        (HEAD + b"FASN,0.1\n", "per_gene.csv is not a table of numbers"),
        (
            b"gene,spearman\nFASN,0.1\n",
            "per_gene.csv has no column pearson, mse, mean_observed, heg50, n_sections, ceiling; score",
        ),
    ],
)
def test_a_damaged_table_of_genes_is_one_line(tmp_path: Path, content: bytes, says: str, capsys) -> None:
    folder = write_run(tmp_path / "x", spots=20, genes=5)
    (folder / "per_gene.csv").write_bytes(content)
    assert main([f"run={folder}"]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["predictions.h5ad", "metrics.json", "per_gene.csv", "audit.json", "provenance.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "x", spots=20, genes=5)
    (folder / name).unlink()
    assert main([f"run={folder}"]) == 2
    error = capsys.readouterr().err
    assert f"{name} does not exist" in error and error.count("\n") == 1
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("name", ["predictions.h5ad", "metrics.json", "per_gene.csv"])
def test_half_a_file_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "x", spots=20, genes=5)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2] + b"x")
    with pytest.raises(InputError, match=re.escape(name)):
        write_report(folder)


@pytest.mark.parametrize(
    ("name", "path", "says"),
    [
        ("metrics", ["n_spots"], "n_spots"),
        ("metrics", ["sections", "B2", "floors"], "sections.B2.floors"),
        ("audit", ["items", 1, "detail"], "items.1.detail"),
        ("provenance", ["data_manifest"], "data_manifest"),
    ],
)
def test_what_a_file_lacks_is_named(tmp_path: Path, name: str, path: list, says: str) -> None:
    folder = write_run(tmp_path / "x", spots=20, genes=5)
    content = json.loads((folder / f"{name}.json").read_text())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    (folder / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=re.escape(f"{name}.json has no {says}")):
        write_report(folder)


def test_a_bug_of_the_page_is_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "x", spots=20, genes=5)
    monkeypatch.setattr("stexp.reporting.run_page.score_chart", lambda: None)
    with pytest.raises(TypeError):
        write_report(folder)
    assert not list(folder.glob(".*report*"))


def test_the_first_gene_is_the_best_that_varies() -> None:
    values = np.random.default_rng(0).normal(size=(50, 6)) * [0, 0.1, 1, 2, 3, 4]
    values[0, 4] = np.nan  # not measured everywhere
    assert first_gene([values], [0, 1, 4, 3, 5, 2]) == 3
    assert first_gene([values, values * [1, 1, 1, 0, 1, 1]], [0, 1, 4, 3, 5, 2]) == 5
    assert first_gene([np.zeros((50, 2))], [1, 0]) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "which run"),
        (["run="], "which run"),
        (["rnu=x"], "'rnu=x' is not understood"),
        (["run=a", "fold=B"], "nothing else"),
        (["run=/nowhere/at/all"], "is not a folder"),
    ],
)
def test_bad_arguments_get_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "stexp-report run=" in capsys.readouterr().out


def test_command_writes_without_torch(run: Path) -> None:
    code = (
        f"import sys; from stexp.cli.report import main; main(['run={run}']); "
        "assert not {'torch', 'scanpy', 'hydra'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("wrote ")
