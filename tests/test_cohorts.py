"""Trained on one data set, tested on another."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from demo_run import overrides_of
from sections import make_section
from test_tables import write_run

from stexp import construct
from stexp.api.data import SpotDataModule as ServedInPython
from stexp.api.evaluate import evaluate
from stexp.cli.fold import train
from stexp.cli.train import main
from stexp.config import build, dataset_of, plugins
from stexp.config import compose as composing
from stexp.config.compose import compose
from stexp.data.cohorts import batch_effects, check_scales, harmonised, join_cohorts
from stexp.data.datamodule import SpotDataModule
from stexp.errors import InputError
from stexp.protocol import Protocol
from stexp.reporting.outside import inside_and_outside
from stexp.reporting.tables import by_table
from stexp.runs.finished import FinishedRun
from stexp.runs.folder import RunFolder
from stexp.runs.rescore import predict_again
from stexp.runs.scored import read_scored_run

COHORT = Protocol("strict", hold_out="cohort", min_spots=0.0, panel_size=20)


def test_one_name_in_two_cohorts_is_told_apart_or_refused(tmp_path: Path) -> None:
    ours, theirs = make_section(tmp_path, "A1", "A"), make_section(tmp_path, "S9", "A", seed=1)
    joined = join_cohorts([ours], [theirs], "one", "other")
    assert [(part.name, part.patient, part.cohort) for part in joined] == [
        ("A1", "A", ""),
        ("other-S9", "other-A", "other"),
    ]
    apart = join_cohorts([ours], [replace(theirs, patient="P")], "one", "other")
    assert [(part.name, part.patient) for part in apart] == [("A1", "A"), ("S9", "P")]
    with pytest.raises(InputError, match=r"both one, and both have A"):
        join_cohorts([ours], [theirs], "one", "one")


def test_pixels_of_another_size_need_tiles_in_micrometres(tmp_path: Path) -> None:
    ours, theirs = make_section(tmp_path, "A1", "A"), make_section(tmp_path, "X1", "X", um_per_px=0.25)
    joined = join_cohorts([ours], [theirs], "one", "other")
    with pytest.raises(InputError, match=r"data\.tile_um="):
        check_scales(joined, None, 224)
    check_scales(joined, 112, 224)
    check_scales(join_cohorts([ours], [replace(theirs, um_per_px=0.51)], "one", "other"), None, 224)


def test_genes_are_those_of_both_and_chosen_on_the_training_side(tmp_path: Path, caplog) -> None:
    genes = [f"g{i:02d}" for i in range(30)]
    ours = [make_section(tmp_path, name, name[0], genes=genes, seed=n) for n, name in enumerate(("A1", "B1", "C1"))]
    theirs = [make_section(tmp_path, "X1", "X", genes=[*genes[5:], "other"], seed=7)]
    sizes = {"tile_px": 16, "cache_dir": str(tmp_path / "cache"), "augmentation": "none"}
    joined = join_cohorts(ours, theirs, "one", "other")
    data = SpotDataModule(joined, COHORT, "other", **sizes)
    assert data.names("test") == ["X1"] and set(data.names("train", "validation")) == {"A1", "B1", "C1"}
    assert len(data.panel) == 20 and set(data.panel) <= set(genes[5:])
    assert "are dropped" in caplog.text
    shallow = replace(theirs[0], spots=theirs[0].spots[::-1].copy())  # other counts of the same genes choose nothing
    again = SpotDataModule(join_cohorts(ours, [shallow], "one", "other"), COHORT, "other", **sizes)
    assert again.panel == data.panel
    few = [make_section(tmp_path, "Y1", "Y", genes=[gene for gene in genes if gene not in data.panel], seed=8)]
    targeted = SpotDataModule(join_cohorts(ours, few, "one", "other"), replace(COHORT, n_hvg=30), "other", **sizes)
    assert targeted.panel and set(targeted.panel).isdisjoint(data.panel)  # among what both measure
    assert harmonised(["g01", "g09", "g08"], theirs) == ["g09", "g08"]
    with pytest.raises(InputError, match="measures none"):
        harmonised(["g01"], theirs)
    lines = batch_effects(data.sections, data.panel)
    assert len(lines) == 2 and lines[0].startswith("trained on: 3") and lines[1].startswith("tested on: 1")
    assert set(lines) <= set(data.summary()) and batch_effects(ours, genes) == []


def configure(demo: Path, out: Path, *overrides: str):
    root = f"test_data.root={demo / 'theirs'}"
    own = ["test_data.reader.patients=2", "test_data.reader.sections_per_patient=1", "test_data.reader.seed=5"]
    cohort = ["test_data=demo", root, "test_data.name=theirs", *own]
    return compose("train", [*overrides_of(demo, out), *cohort, *overrides])


@pytest.fixture(scope="module")
def cohort(demo: Path, tmp_path_factory):
    """A run on the demo data that is tested on other demo data; its config and sections."""
    out = tmp_path_factory.mktemp("runs") / "cohort"
    cfg = configure(demo, out, "trainer.max_epochs=1", "image_encoder.frozen=true", "data.augmentation=none")
    sections = dataset_of(cfg).read_sections(build(cfg.protocol))
    train(cfg, sections, "theirs", out)
    return cfg, sections, out


@pytest.mark.slow
def test_a_run_on_another_cohort_has_all_that_a_run_has(cohort) -> None:
    cfg, sections, out = cohort
    metrics, audit, record = (
        json.loads((out / f"{name}.json").read_text()) for name in ("metrics", "audit", "provenance")
    )
    assert metrics["data"] == "demo-to-theirs" and set(metrics["sections"]) == {"theirs-A1", "theirs-B1"}
    assert {"ridge_features", "mean", "depth_oracle"} <= set(metrics["floors"]) and metrics["ceiling"][
        "pearson_acg"
    ] > 0
    assert audit["leaks"] == 0 and set(audit["facts"]["train"] + audit["facts"]["validation"]) == {"A1", "B1", "C1"}
    item = next(item for item in audit["items"] if item["name"] == "another_cohort")
    assert "counts (median)" in item["detail"]
    assert set(record["data_manifest"]) == {"A1", "B1", "C1", "theirs-A1", "theirs-B1"}
    assert train(cfg, sections, "theirs", out)["scores"] == pytest.approx(metrics["scores"])  # it is finished


def test_a_run_on_another_cohort_opens_with_both(cohort, tmp_path: Path) -> None:
    _, _, out = cohort
    run = FinishedRun(RunFolder(out))
    assert run.fold == "theirs" and run.data.names("test") == ["theirs-A1", "theirs-B1"]
    again = predict_again(out, {"k": 3}, "panel", str(tmp_path / "again"))
    assert json.loads((again / "audit.json").read_text())["facts"]["cohorts"]


@pytest.mark.slow
def test_a_copy_across_cohorts_is_refused(demo: Path, tmp_path: Path) -> None:
    cfg = configure(demo, tmp_path / "run", f"test_data.root={demo / 'data'}", "test_data.reader.seed=0")
    sections = dataset_of(cfg).read_sections(build(cfg.protocol))
    with pytest.raises(InputError, match="are copies by their counts"):
        train(cfg, sections, "theirs", tmp_path / "run")


def test_in_python_other_sections_are_tested(demo: Path, tmp_path: Path) -> None:
    ours = [make_section(tmp_path, name, name[0], n=36, seed=n) for n, name in enumerate(("A1", "B1"))]
    theirs = [make_section(tmp_path, "A1x", "A", n=36, seed=9)]
    data = ServedInPython(ours, test_data=theirs, test_name="theirs", tile_px=16, cache_dir=tmp_path / "cache")
    assert data.fold == "theirs" and data.names("test") == ["theirs-A1x"]
    config = data.run_config({"model": "mean"}, {})
    assert config["test_data"]["name"] == "theirs" and config["protocol"]["hold_out"] == "cohort"
    for protocol in ("blocks", "paper"):
        with pytest.raises(InputError, match=f"protocol={protocol} .* protocol=strict would fit"):
            ServedInPython(ours, protocol, test_data=theirs)


def test_predictions_of_another_tool_on_another_cohort(demo: Path, tmp_path: Path) -> None:
    ours = [make_section(tmp_path, name, name[0], n=36, seed=n) for n, name in enumerate(("A1", "B1"))]
    theirs = [make_section(tmp_path, "X1", "X", n=36, seed=9)]
    sizes = {"tile_px": 32, "cache_dir": tmp_path / "cache", "image_encoder": "tiny", "random_features": 0}
    data = ServedInPython(ours, test_data=theirs, test_name="theirs", name="ours", **sizes)
    evaluate(data.target[data.rows("test")], data, output_dir=tmp_path / "run", trained_on=[])
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["data"] == "ours-to-theirs"
    config = RunFolder(tmp_path / "run").config
    assert config["test_data"]["name"] == "theirs" and config["random_features"] == 0
    items = {item["name"]: item for item in json.loads((tmp_path / "run" / "audit.json").read_text())["items"]}
    assert "counts (median)" in items["another_cohort"]["detail"] and not items["another_cohort"]["leak"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["test_data.root=x"], r"test_data=NAME"),
        (["test_data=dmo"], r"test_data=dmo: choose .*did you mean demo"),
        (["test_data=demo", "test_data.rot=x"], r"no key test_data\.rot; did you mean test_data\.root"),
        (["test_data=demo", "protocol=blocks"], r"protocol=strict would fit"),
        (["test_data=demo", "protocol=paper"], r"protocol\.panel=all.* protocol=strict would fit"),
        (["test_data=demo", "protocol.published=true"], r"protocol\.published=true.* protocol=strict would fit"),
        (["+test_data=demo"], r"\+test_data=demo: test_data=NAME"),
        (["++test_data=demo"], r"test_data=NAME"),
        (["~test_data"], r"test_data=NAME"),
        (["test_data@x=demo"], r"test_data=NAME"),
        (["test_data=demo,her2st"], r"need -m"),
        (["test_data=demo", "test_data.allow_duplicates=/x/data.csv"], r"^test_data\.allow_duplicates=/x/data\.csv: "),
    ],
)
def test_what_is_mistyped_is_said(overrides: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        compose("train", overrides)


def test_the_last_choice_of_tested_data_holds() -> None:
    assert compose("train", ["test_data=null"]).test_data is None
    assert compose("train", ["test_data=demo", "test_data=null"]).test_data is None
    more = ["test_data=her2st", "test_data=demo", "+test_data.reader.more=1"]
    config = compose("train", more)
    assert config.test_data.name == "demo" and config.test_data.reader.more == 1


@pytest.mark.parametrize("line", [["test_data=demo", "--cfg", "job"], ["-m", "+test_data=demo"]])
def test_what_hydra_would_compose_without_the_tested_data_is_refused(line: list[str], monkeypatch, capsys) -> None:
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    monkeypatch.setattr(sys, "argv", ["stexp-train", *line])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "test_data=" in capsys.readouterr().err


def test_plugins_of_the_tested_data_are_recorded(tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / "theirplugin"
    (package / "conf" / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "conf" / "data" / "theirdata.yaml").write_text("defaults: [demo]\nname: theirdata\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(construct, "installed_plugins", lambda: {"theirplugin": "their-dist"})
    caches = (plugins._installed, plugins.default_sources, composing._groups)
    for cached in caches:
        cached.cache_clear()
    try:
        config = compose("train", ["test_data=theirdata"])
        assert config.plugins == ["theirplugin"] and config.test_data.name == "theirdata"
    finally:
        for cached in caches:
            cached.cache_clear()


def write_outside(folder: Path, sections: dict[str, float], **options) -> Path:
    """A run that trained on demo and tested on the cohort C."""
    write_run(folder, sections, **{"protocol.hold_out": "cohort"}, **options)
    return change_metrics(folder, data="demo-to-C")


def change_metrics(folder: Path, **changes) -> Path:
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, **changes}))
    return folder


def shown(folders: list[Path]) -> tuple[str, dict[str, list[str]]]:
    """Text of inside and outside, and the cells of its rows."""
    (text,) = inside_and_outside(by_table([read_scored_run(folder) for folder in folders]))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert len({name for name, *_ in lines}) == len(lines)
    return text, {name: cells for name, *cells in lines}


def test_a_table_shows_inside_against_outside(tmp_path: Path) -> None:
    inside = [write_run(tmp_path / fold, {f"{fold}1": acg}) for fold, acg in (("A", 0.2), ("B", 0.4))]
    outside = write_outside(tmp_path / "outside", {"C1": 0.1})
    text, rows = shown([*inside, outside])
    assert rows["mclstexp"] == ["0.300", "0.100", "-0.200", "38 %", "12 %"] and "Gap" not in text
    groups = by_table([read_scored_run(folder) for folder in (*inside, outside)])
    assert inside_and_outside([group for group in groups if "to-C" not in group[0]]) == []


def test_inside_and_outside_average_no_gap_and_no_copy(tmp_path: Path) -> None:
    folds = (("A", 0.2), ("B", 0.4))
    whole = [write_run(tmp_path / "x" / fold, {f"{fold}1": acg}, model="x") for fold, acg in folds]
    outside = [write_outside(tmp_path / "out" / model, {"C1": 0.1}, model=model) for model in "xyz"]
    gap = [write_run(tmp_path / "y" / "A", {"A1": 0.9}, model="y")]
    copies = [write_run(tmp_path / "z" / fold, {f"{fold}1": acg}, model="z") for fold, acg in folds]
    copies.append(write_run(tmp_path / "z" / "again", {"B1": 0.8}, model="z"))
    text, rows = shown([*whole, *gap, *copies, *outside])
    assert rows["x"] == ["0.300", "0.100", "-0.200", "38 %", "12 %"]
    assert rows["y"] == rows["z"] == ["–", "0.100", "–", "–", "12 %"]
    assert "Gap: y, seed 0, lacks fold B inside." in text
    assert re.search(r"Gap: z, seed 0, lacks fold B \(it has 2 runs of it; [^)]*\) inside\.", text)


def test_inside_and_outside_tell_a_method_from_one_of_its_name_elsewhere(tmp_path: Path) -> None:
    ours = write_run(tmp_path / "ours", {"A1": 0.2})
    theirs = change_metrics(
        write_outside(tmp_path / "theirs", {"C1": 0.1}),
        elsewhere={
            **{"trained_on": None, "genes_chosen_on": None, "genes_by": "protocol", "left_over": {}},
            "scale": {"named": "target", "looks_like": None, "errors": True, "statement": "On the scale of the truth."},
            "n_renamed_genes": 0,
            "coverage": {"n_spots": 9, "of_spots": 9, "n_genes": 2, "of_genes": 2, "missing_genes": []},
        },
    )
    _, rows = shown([ours, theirs])
    assert rows["mclstexp"][:2] == ["0.200", "–"] and rows["mclstexp (elsewhere) †"][:2] == ["–", "0.100"]


def test_inside_and_outside_have_the_choices_that_tell_tables_apart(tmp_path: Path) -> None:
    inside = [write_run(tmp_path / "inside", {"A1": 0.2}, **{"protocol.k": 50})]
    text, _ = shown([*inside, write_outside(tmp_path / "auto", {"C1": 0.1})])
    assert "1 fold(s)" in text, "k is a setting of a method, not of a table"
    outside = write_outside(tmp_path / "gene", {"C1": 0.1}, **{"protocol.truth": "gene"})
    assert inside_and_outside(by_table([read_scored_run(folder) for folder in (*inside, outside)])) == []
