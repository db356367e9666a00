"""``stexp-complete``, from a command line to its folder and its page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from browser import CHROMIUM, browser

from stexp.cli.complete import complete_section, folder_of, main, refuse_other_data
from stexp.completion.dense import dense_map, dense_places
from stexp.completion.problem import spot_problem
from stexp.completion.spots import fit_kriging
from stexp.config import build, to_plain
from stexp.config.compose import compose
from stexp.data.dataset import DataSet
from stexp.data.section import Section
from stexp.errors import InputError
from stexp.reporting.report import write_report

Command = Callable[..., None]


def arguments(root: Path, out: Path, *more: str) -> list[str]:
    return [
        *("data=demo", f"data.root={root / 'data'}", f"data.cache_dir={root / 'cache'}", "data.reader.patients=3"),
        *("data.reader.sections_per_patient=1", "device=cpu", f"output_dir={out}", *more),
    ]


@pytest.fixture(scope="module")
def sections(demo: Path) -> list[Section]:
    cfg = compose("complete", arguments(demo, demo / "x", "known=spots"))
    return DataSet(to_plain(cfg.data)).read_sections(build(cfg.protocol))


def complete(demo: Path, sections: list[Section], out: Path, *more: str) -> Path:
    """Complete section A1 as the command does."""
    cfg = compose("complete", arguments(demo, out, *more))
    config = to_plain(cfg)
    complete_section(sections[0], sections, build(cfg.protocol), DataSet(config["data"]), config, several=False)
    return out


@pytest.fixture(scope="module")
def spots(demo: Path, sections: list[Section], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("complete") / "spots"
    return complete(demo, sections, out, "known=spots", "share=0.3", "methods=[ridge_kriging]", "dense=2")


def test_a_completion_leaves_a_folder(spots: Path, sections: list[Section]) -> None:
    result = json.loads((spots / "result.json").read_text())
    predictions, between = ad.read_h5ad(spots / "predictions.h5ad"), ad.read_h5ad(spots / "dense.h5ad")
    shown = pd.read_csv(spots / "shown.csv")
    n = len(sections[0])
    assert shown["shown"].sum() == result["n_spots_shown"] == round(0.3 * n)
    assert list(predictions.obs["spot"]) == list(shown["spot"][~shown["shown"]])
    assert set(result["methods"]) == {"ridge_kriging"} and result["references"] == ["B1", "C1"]
    assert result["map"] in predictions.uns["stexp"]["predicted_by"]
    # on the demo, whose genes follow its image and its regions, both together are better than either
    acg = {name: own["pearson_acg"] for name, own in (result["floors"] | result["methods"]).items()}
    assert acg["ridge_kriging"] > acg["kriging"] > acg["nearest"] > acg["mean"] == 0
    assert result["outcome"] == "win" and result["best_method"] == "ridge_kriging"
    for name in acg:
        assert np.isfinite(predictions.layers[f"predicted_{name}"]).all()
        assert (predictions.layers[f"uncertainty_{name}"] > 0).all()
        assert 0.8 < (result["floors"] | result["methods"])[name]["coverage_95"] < 1
    provenance = result["provenance"]
    assert {"command", "commit", "date", "hardware", "data_manifest", "versions", "seconds"} <= set(provenance)
    assert set(provenance["data_manifest"]) == {"A1", "B1", "C1"}
    table = pd.read_csv(spots / "per_gene.csv")
    assert list(table["gene"]) == list(predictions.var_names)
    assert table["ridge_kriging"].mean() == pytest.approx(acg["ridge_kriging"], abs=1e-4)
    assert list(between.var_names) == list(predictions.var_names) and np.isfinite(between.X).all()


def test_a_map_between_spots_is_kriged_from_those_shown(sections: list[Section]) -> None:
    protocol = build(compose("complete", ["known=spots"]).protocol)
    problem = spot_problem(sections[0], [], protocol, list(sections[0].genes[:5]), features={}, share=0.3)
    between = dense_map(problem, 2)
    task = problem.task
    places = dense_places(task.xy, 2)
    mean, sd = fit_kriging(task).predict(task.xy[task.shown], task.expression, places)
    np.testing.assert_allclose(between.layers["predicted"], mean, rtol=1e-5)
    np.testing.assert_allclose(between.layers["uncertainty"], sd, rtol=1e-5)
    distance = np.linalg.norm(places[:, None] - task.xy[None], axis=2)
    assert distance.min(axis=1).max() <= 0.75 and len(places) > 3 * len(task.xy)
    near = distance[:, task.shown].min(axis=1) <= 0.5
    assert np.array_equal(np.isfinite(between.layers["observed"]).all(axis=1), near)
    # surer near what is shown
    assert sd[near].mean() < sd[~near].mean()
    assert len(dense_places(np.stack(np.meshgrid(np.arange(90.0), np.arange(90.0)), -1).reshape(-1, 2), 3)) <= 20_000


def test_a_finished_folder_is_left_and_another_is_refused(
    spots: Path, demo: Path, sections: list[Section], capsys: pytest.CaptureFixture
) -> None:
    before = (spots / "result.json").stat().st_mtime_ns
    same = ("known=spots", "share=0.3", "methods=[ridge_kriging]", "dense=2")
    complete(demo, sections, spots, *same)
    assert (spots / "result.json").stat().st_mtime_ns == before
    assert "ridge kriging" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"another config \(share\)"):
        complete(demo, sections, spots, *same[:1], "share=0.4", *same[2:])
    assert (spots / "result.json").stat().st_mtime_ns == before
    other = spots.parent / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds files"):
        complete(demo, sections, other, *same)
    assert [path.name for path in other.iterdir() if path.name != ".lock"] == ["notes.txt"]
    record = json.loads((spots / "result.json").read_text())["provenance"]["data_manifest"]
    refuse_other_data(spots, record, sections)
    with pytest.raises(InputError, match=f"data of {sections[0].name} changed"):
        refuse_other_data(spots, record | {sections[0].name: {"counts.tsv": "0"}}, sections)


def test_genes_are_learned_from_an_h5ad(demo: Path, sections: list[Section], tmp_path: Path) -> None:
    cells = sections[1].spots
    ad.AnnData(sp.csr_matrix(cells.X), obs=cells.obs[[]], var=pd.DataFrame(index=cells.var_names)).write_h5ad(
        tmp_path / "cells.h5ad"
    )
    out = tmp_path / "genes"
    genes = sections[0].genes[:40].tolist()
    more = ("known=genes", "share=0.5", f"data.panel=[{','.join(genes)}]", "methods=[]")
    complete(demo, sections, out, *more, f"reference={tmp_path / 'cells.h5ad'}")
    result = json.loads((out / "result.json").read_text())
    assert result["references"] == ["cells"] and result["n_genes_shown"] == result["n_genes_asked"] == 20
    assert result["floors"]["ridge"]["pearson_acg"] > 0.1 and result["methods"] == {} and result["best_method"] is None
    assert ad.read_h5ad(out / "predictions.h5ad").shape == (len(sections[0]), 20)
    assert not (out / "dense.h5ad").exists()
    assert set(pd.read_csv(out / "shown.csv")["gene"]) == set(genes)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "known=spots or known=genes"),
        (["known=spot"], "did you mean spots"),
        (["known=spots", "share=1.5"], "share=1.5"),
        (["known=spots", "pattern=grid", "share=0.5"], "leave share out"),
        (["known=genes", "pattern=strip"], "pattern=strip"),
        (["known=spots", "methods=[krigging]"], "none that completes spots"),
        (["known=genes", "methods=retrieval"], "ridge_neighbours"),
        (["known=spots", "show=nearst"], "did you mean nearest"),
        (["known=spots", "reference=patient"], "did you mean patients"),
        (["known=spots", "reference=cells.h5ad"], "known=genes"),
        (["known=genes", "reference=cells.h5ad"], "no file"),
        (["known=genes", "reference=none"], "FILE.h5ad"),
        (["known=spots", "data.stain=macenko"], "null would fit"),
        (["known=spots", "protocol.truth=gene"], "protocol.truth=spot"),
        (["known=spots", "fold=A9"], "there are A1, B1, C1"),
    ],
)
def test_what_does_not_fit_is_one_line(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture, more: list[str], says: str
) -> None:
    cfg = compose("complete", arguments(demo, tmp_path / "out", *more))
    with pytest.raises(SystemExit) as ended:
        main.__wrapped__(cfg)  # type: ignore[attr-defined]  # of functools.wraps
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stexp")]
    assert ended.value.code == 2 and len(lines) == 1 and says in lines[0]
    assert not (tmp_path / "out").exists()


def test_folders_are_called_by_what_is_shown() -> None:
    config = {"data": {"name": "demo"}, "known": "spots", "share": None, "pattern": "random", "seed": 3}
    config |= {"output_dir": None}
    assert folder_of(config, "A1", several=False) == Path("runs/demo-spots-0.1-A1-s3")
    assert folder_of(config | {"pattern": "grid"}, "A1", several=True) == Path("runs/demo-spots-grid-A1-s3")
    assert (
        folder_of(config | {"pattern": "strip", "share": 0.7}, "A1", several=True).name == "demo-spots-strip-0.7-A1-s3"
    )
    assert folder_of(config | {"output_dir": "x"}, "A1", several=True) == Path("x/A1")


def test_a_page_escapes_what_it_is_told(spots: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(spots, tmp_path / "hostile")
    result = json.loads((folder / "result.json").read_text())
    result |= {"verdict": "<script>alert(1)</script>", "data": "<b>x</b>"}
    result["settings"]["kriging"] = {"<i>": "<i>"}
    (folder / "result.json").write_text(json.dumps(result))
    page = write_report(folder).read_text()
    assert "<script>alert" not in page and "<b>x</b>" not in page and "<i>:" not in page and "&lt;script&gt;" in page
    (folder / "result.json").write_text(json.dumps({**result, "floors": 3}))
    with pytest.raises(InputError, match="floors"):
        write_report(folder)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_shows_maps_between_the_spots(spots: Path, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as new_page:
        page = new_page()
        page.size(1200, 900)
        page.open(spots / "report.html")
        names = page.js("[...document.querySelectorAll('#section option')].map(own => own.textContent.trim())")
        assert names == ["between the spots, by kriging", "hidden spots, by ridge kriging"]
        assert "Pearson" not in page.js("document.getElementById('about-gene').textContent"), (
            "nothing is measured there"
        )
        assert page.js("document.getElementById('scatter-figure').hidden") is True
        drawn = page.js("document.getElementById('right').toDataURL()")
        page.js(
            "(() => { const own = document.getElementById('section'); own.value = '1';"
            "own.dispatchEvent(new Event('change')); })()"
        )
        page.wait("document.getElementById('about-gene').textContent.includes('hidden spots, by ridge kriging')")
        page.wait("document.getElementById('scatter-figure').hidden === false")
        assert page.js("document.getElementById('right').toDataURL()") != drawn
        assert page.said == []


def test_a_section_without_an_image_is_completed_by_place(demo: Path, sections: list[Section], tmp_path: Path) -> None:
    blind = [replace(sections[0], slide=None), *sections[1:]]
    out = complete(demo, blind, tmp_path / "blind", "known=spots", "share=0.5", "methods=[]", "dense=0")
    result = json.loads((out / "result.json").read_text())
    assert result["image_encoder"] is None and "ridge_features" not in result["floors"]


def test_records_are_of_committed_code(spots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import completion  # of experiments/

    shutil.copytree(spots, tmp_path / "demo-spots" / "A1", ignore=shutil.ignore_patterns("*.h5ad"))
    path = tmp_path / "demo-spots" / "A1" / "result.json"
    result = json.loads(path.read_text())
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(completion, "HERE", tmp_path)
    for changes in ({"commit": None, "dirty": None}, {"commit": "c0ffee", "dirty": True}):
        path.write_text(json.dumps({**result, "provenance": result["provenance"] | changes}))
        with pytest.raises(SystemExit, match="commit"):
            completion.add(tmp_path / "demo-spots")
    path.write_text(json.dumps({**result, "provenance": result["provenance"] | {"commit": "c0ffee", "dirty": False}}))
    record = json.loads(completion.add(tmp_path / "demo-spots").read_text())
    assert record["completed"]["A1"]["methods"] == result["methods"]
    assert set(record["provenance"]["data_manifest"]) == {"A1", "B1", "C1"}
    table = completion.tables()
    own, floor = result["methods"]["ridge_kriging"]["pearson_acg"], result["floors"]["kriging"]["pearson_acg"]
    assert f"| ridge kriging | **{own:.3f} / " in table and f"the best floor is kriging ({floor:.3f})" in table
    assert "Above it in all 1 sections: ridge kriging" in table
