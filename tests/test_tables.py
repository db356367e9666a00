"""Tables of runs: what is averaged, what is refused, what is said."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
import warm
from omegaconf import OmegaConf
from paper_runs import WHOLE_AUDIT, WHOLE_DATA, WHOLE_RECORD
from tabled import tabulate_all

from stexp.cli.table import main as table_main
from stexp.errors import InputError
from stexp.evaluation import predictions
from stexp.models.correction import Correction
from stexp.reporting import rows
from stexp.reporting.labels import label_methods
from stexp.reporting.tables import FILES, Table, latex, markdown
from stexp.runs.scored import find_runs, read_scored_run
from stexp.training.fit import size_of_training

STRICT = {"_target_": "stexp.protocol.Protocol", "name": "strict", "hold_out": "patient", "truth": "spot", "k": "auto"}
ACG = {"A1": 0.10, "A2": 0.20, "B1": 0.30, "C1": 0.40}
FLOORS = {"mean": 0.0, "colour_ridge": 0.15, "knn_features": 0.12, "depth_oracle": 0.5}


def scores(acg: float | None) -> dict[str, float | None]:
    mse = None if acg is None else 1 - acg
    return {"pearson_acg": acg, "pearson_heg50": acg, "spearman_acg": acg, "mse": mse, "mae": mse, "rmse": mse}


def write_run(
    folder: Path,
    sections: dict[str, float],
    *,
    seed: int = 0,
    model: str = "mclstexp",
    encoder: str = "densenet121",
    frozen: bool = False,
    knn: float = 0.12,
    genes: tuple[str, ...] = ("FASN", "GNAS"),
    other: dict[str, float] | None = None,
    chosen: dict | None = None,
    **changes,
) -> Path:
    """A run folder as stexp-train leaves it, as far as tables read it; a section's patient is its first letter."""
    fold = next(iter(sections))[0]
    image = {"_target_": "x", "name": encoder, "pretrained": True, "checkpoint": f"{folder}/w.pt", "frozen": frozen}
    config = {
        "image_encoder": image,
        "protocol": STRICT,
        "model": {"_target_": "x", "name": model, "image_encoder": image, "k": "auto"},
        "trainer": {"_target_": "x", "accelerator": "cpu", "max_epochs": 9},
        "logger": {"save_dir": str(folder)},
        "data": {**WHOLE_DATA, "name": "demo", "root": "data/demo", "stain": None, "cache_dir": str(folder)},
        "hardware": {"channels_last": True},
        "seed": seed,
        "fold": fold,
        "output_dir": str(folder),
    }
    for key, value in changes.items():
        OmegaConf.update(config := OmegaConf.create(config), key, value)
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")

    def part(acg: float) -> dict:
        floors = {name: scores(value) for name, value in {**FLOORS, "knn_features": knn}.items()}
        return {
            "scores": scores(acg),
            "floors": floors,
            "ceiling": {"pearson_acg": 0.8, "pearson_heg50": 0.9},
            "n_spots": 9,
            "n_constant_genes": 0,
        }

    metrics = {
        **part(0.1),
        "protocol": "strict",
        "fold": fold,
        "model": model,
        "data": "demo",
        "oracle_floors": ["depth_oracle"],
        "n_genes": len(genes),
        "chosen": chosen or {"k": 5, "k_validation_pearson": {"5": 0.1}},
        "sections": {name: part(acg) for name, acg in sections.items()},
        "scored_as": {}
        if other is None
        else {"paper": {**part(0.1), "sections": {name: part(acg) for name, acg in other.items()}}},
    }
    if other is not None:
        metrics["scored_as"] = {"paper": {**part(0.1), "sections": {name: part(acg) for name, acg in other.items()}}}
    leak = {"name": "same_patient_in_training", "leak": seed > 0, "detail": ""}
    audit = {
        "leaks": int(seed > 0),
        "items": [leak],
        "facts": {**WHOLE_AUDIT, "patient_of": {name: name[0] for name in ACG}},
    }
    provenance = {
        **WHOLE_RECORD,
        "command": f"stexp-train data=demo model={model} fold={fold} output_dir={folder} seed={seed}",
        "seconds": 60.0 + 60 * seed,
        "peak_memory_gb": 2.5,
        "epochs": 7,
        "parameters": {"total": 8_000_000, "trained": 1_000_000},
        "hardware": {"device": "cpu", "cpu": "EPYC"},
        "data_manifest": {name: {f"{name}.tsv": f"hash of {name}"} for name in ACG},
    }
    for name, content in (("metrics", metrics), ("audit", audit), ("provenance", provenance)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "per_gene.csv").write_text("gene,pearson\n" + "".join(f"{gene},0.1\n" for gene in genes))
    return folder


def write_folds(folder: Path, add: float = 0.0, **options) -> list[Path]:
    """One method on the three patients, one fold each."""
    return [
        write_run(folder / fold, {name: acg + add for name, acg in ACG.items() if name[0] == fold}, **options)
        for fold in "ABC"
    ]


def one(folders: list[Path], scored_as: str | None = None, **options) -> Table:
    (table,) = tabulate_all([read_scored_run(folder, scored_as) for folder in folders], **options)
    return table


def row(table: Table, label: str) -> pd.Series:
    return table.rows.set_index("label").loc[label]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """`ours` is 0.1 above `theirs` in every section."""
    return write_folds(tmp_path / "ours", 0.1, model="ours") + write_folds(tmp_path / "theirs", model="theirs")


def test_means_are_over_sections_and_floors_are_rows(runs: list[Path]) -> None:
    table = one(runs)
    assert table.rows["label"].tolist() == [
        *("ours", "theirs", "floor: colour ridge", "floor: knn features", "floor: mean"),
        *("oracle: depth oracle", "ceiling: counting noise"),
    ]
    ours = row(table, "ours")
    assert ours["pearson_acg"] == pytest.approx(np.mean([0.2, 0.3, 0.4, 0.5]))
    assert ours["pearson_acg_sd_sections"] == pytest.approx(np.std([0.2, 0.3, 0.4, 0.5], ddof=1))
    assert ours["pearson_acg_sd_patients"] == pytest.approx(np.std([0.25, 0.4, 0.5], ddof=1))
    assert (ours["n_sections"], ours["n_patients"], ours["n_seeds"], ours["floors_beaten"]) == (4, 3, 1, 3)
    assert (ours["epochs"], ours["parameters"], ours["trained_parameters"]) == (7, 8_000_000, 1_000_000)
    assert row(table, "floor: colour ridge")["pearson_acg"] == pytest.approx(0.15)


def test_paired_difference_from_the_best_floor_or_the_row_that_is_named(runs: list[Path]) -> None:
    table = one(runs)
    found = table.comparisons.set_index("method")
    assert table.baseline == "floor: colour ridge"
    assert found.loc["ours", "difference"] == pytest.approx(0.35 - 0.15)
    assert found.loc["ours", "p"] == 2 / 2**4 and found.loc["ours", "p_holm"] == 4 / 2**4
    named = one(runs, baseline="theirs").comparisons.set_index("method").loc["ours"]
    np.testing.assert_allclose(named[["difference", "low", "high"]].astype(float), 0.1)
    assert one(runs, baseline="knn_features").baseline == "floor: knn features"
    errors = one(runs, metric="mse")
    assert errors.rows["label"].tolist()[:2] == ["ours", "theirs"]
    assert errors.comparisons.set_index("method").loc["ours", "difference"] == pytest.approx(-0.2)


def test_equal_runs_do_not_differ(tmp_path: Path) -> None:
    folders = write_folds(tmp_path / "x", model="x") + write_folds(tmp_path / "y", model="y")
    found = one(folders, baseline="x").comparisons.iloc[0]
    assert found[["difference", "low", "high", "p", "p_holm"]].tolist() == [0, 0, 0, 1, 1]


def test_order_of_the_runs_changes_nothing(runs: list[Path]) -> None:
    again = one(runs[::-1])
    for part in ("rows", "comparisons", "sections"):
        pd.testing.assert_frame_equal(getattr(one(runs), part), getattr(again, part))


def test_seeds_are_averaged_by_section_and_spread_on_their_own(tmp_path: Path) -> None:
    folders = [f for seed in (0, 1) for f in write_folds(tmp_path / str(seed), 0.1 * seed, seed=seed)]
    found = row(one(folders), "mclstexp")
    assert found["pearson_acg"] == pytest.approx(0.25 + 0.05) and found["n_seeds"] == 2
    assert found["pearson_acg_sd_seeds"] == pytest.approx(np.std([0.25, 0.35], ddof=1))
    assert found["pearson_acg_sd_sections"] == pytest.approx(np.std(list(ACG.values()), ddof=1))
    assert (found["leaks"], found["seconds"]) == ("0–1", 90)


def test_a_gap_is_refused_with_the_command_that_fills_it(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ours, seed 0, lacks fold C") as error:
        one([runs[0], runs[1], *runs[3:]])
    assert str(error.value).endswith(f"stexp-train data=demo model=ours fold=C output_dir={tmp_path}/ours/C")
    assert "\n" not in str(error.value)


def test_a_gap_of_a_run_in_python_is_filled_in_python(runs: list[Path]) -> None:
    record = json.loads((runs[0] / "provenance.json").read_text())
    record["command"] = f"stexp.fit('ours', SpotDataModule(...), output_dir='{runs[0]}')"
    (runs[0] / "provenance.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="lacks fold C") as error:
        one([runs[0], *runs[3:], runs[1]])
    assert "fit fold C in Python" in str(error.value) and "fold='C'" in str(error.value)
    assert "fit(" not in str(error.value) and " fold=C" not in str(error.value) and "\n" not in str(error.value)


def test_a_gap_is_printed_as_a_gap_and_never_averaged(runs: list[Path]) -> None:
    table = one([runs[0], runs[1], *runs[3:]], allow_missing=True)
    assert np.isnan(row(table, "ours")["pearson_acg"]) and row(table, "ours")["n_sections"] == 3
    assert table.comparisons["method"].tolist() == ["theirs"]
    text = markdown(table)
    assert "Gap: ours, seed 0, lacks fold C." in text
    by_section = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| C1")]
    assert [cell.strip() for cell in by_section[0]] == ["C1", "C", "0.400", "–", "0.150"]


def test_two_runs_of_one_cell_are_left_out_and_named(tmp_path: Path) -> None:
    folders = write_folds(tmp_path / "ours", model="ours") + write_folds(tmp_path / "theirs", model="theirs")
    folders.append(write_run(tmp_path / "again", {"B1": 0.9}, model="ours"))
    with pytest.raises(InputError, match=r"same method, seed 0 and fold B; name one of them in runs="):
        one(folders)
    table = one(folders, allow_missing=True)
    (gap,) = table.gaps
    assert gap[:2] == ("ours, seed 0,", "fold B") and all(
        str(folder) in gap.fill for folder in (folders[1], folders[6])
    )
    assert np.isnan(row(table, "ours")["pearson_acg"]) and row(table, "theirs")["n_sections"] == 4
    with pytest.raises(InputError, match="same method"):  # nothing is left to print
        one([folders[1], folders[6]], allow_missing=True)


def test_a_table_that_cannot_be_made_leaves_the_others(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    write_run(tmp_path / "runs" / "x", {"A1": 0.1})
    write_run(tmp_path / "runs" / "y", {"A1": 0.2}, seed=1, genes=("FASN",))
    write_run(tmp_path / "runs" / "z", {"A1": 0.3}, **{"protocol.name": "paper"})
    arguments = ["stexp-table", f"runs={tmp_path / 'runs'}", f"output_dir={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        table_main()
    printed = capsys.readouterr().out
    assert ended.value.code == 2 and "## demo, protocol paper" in printed and "protocol strict" not in printed
    assert (tmp_path / "out" / "table.md").is_file()
    monkeypatch.setattr(sys, "argv", [*arguments[:2], "allow_missing=false", f"output_dir={tmp_path / 'none'}"])
    with pytest.raises(SystemExit):
        table_main()
    assert not (tmp_path / "none").exists() and "##" not in capsys.readouterr().out


def test_a_section_that_others_were_tested_on_is_missed(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "x", {"A1": 0.1, "A2": 0.2}, model="x"),
        write_run(tmp_path / "y", {"A1": 0.1}, model="y"),
    ]
    with pytest.raises(InputError, match=r"y, seed 0, lacks section A2 of fold A .*data\.sections"):
        one(folders)


def test_floors_of_other_features_are_rows_of_their_own(tmp_path: Path) -> None:
    folders = write_folds(tmp_path / "x", encoder="resnet18", knn=0.2) + write_folds(
        tmp_path / "y", encoder="vit", knn=0.3
    )
    folders += write_folds(tmp_path / "z", encoder="vit", frozen=True, knn=0.3004)
    labels = one(folders).rows["label"].tolist()
    assert labels[:3] == ["mclstexp resnet18 fine-tuned", "mclstexp vit fine-tuned", "mclstexp vit frozen"]
    assert [label for label in labels if "knn" in label] == [
        "floor: knn features (vit)",
        "floor: knn features (resnet18)",
    ]
    assert labels.count("floor: colour ridge") == 1


def test_labels_are_the_shortest_that_tell_methods_apart() -> None:
    common = {
        "model.name": "m",
        "image_encoder.name": "vit",
        "image_encoder.frozen": True,
        "image_encoder.pretrained": True,
    }
    assert label_methods([common, common]) == (["m", "m"], [])
    changed = {**common, "model.k": 50, "trainer.max_epochs": 9}
    assert label_methods([{**common, "model.k": 5, "trainer.max_epochs": 3}, changed]) == (
        ["m k=5", "m k=50"],
        ["trainer.max_epochs"],
    )
    crossed = [{**common, "model.k": k, "data.stain": stain} for k in (1, 2) for stain in (None, "reinhard")]
    assert label_methods(crossed)[0] == ["m k=1", "m k=1 stain=reinhard", "m k=2", "m k=2 stain=reinhard"]
    # a key that only a later version writes does not make another method
    assert label_methods([common, {**common, "data.later": 0.1}])[0] == ["m", "m"]


def test_where_a_run_ran_is_no_other_method(tmp_path: Path) -> None:
    folders = write_folds(tmp_path / "x") + write_folds(tmp_path / "y", seed=1, **{"trainer.accelerator": "gpu"})
    assert one(folders).rows["label"].tolist()[0] == "mclstexp"


def test_rescored_folds_are_one_method_though_each_chose_its_k(tmp_path: Path) -> None:
    folders = [
        write_run(
            tmp_path / fold,
            {f"{fold}1": 0.1},
            chosen={"k": k, "k_validation_pearson": {}, "rescored_from": "x", "changed": {"distance": "l2"}},
            **{"model.k": k},
        )
        for fold, k in (("A", 5), ("B", 10))
    ]
    assert row(one(folders), "mclstexp")["n_sections"] == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "are the same method, seed 0 and fold A; name one of them"),
        ({"seed": 1, "genes": ("FASN",)}, r"they predict other genes \(fold A, section A1\)"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(tmp_path: Path, options: dict, says: str) -> None:
    folders = [write_run(tmp_path / "x", {"A1": 0.1}), write_run(tmp_path / "y", {"A1": 0.2}, **options)]
    with pytest.raises(InputError, match=says):
        one(folders)


def test_another_file_behind_a_section_is_refused(runs: list[Path]) -> None:
    record = json.loads((runs[3] / "provenance.json").read_text())
    record["data_manifest"]["A2"]["A2.tsv"] = "changed"
    (runs[3] / "provenance.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"section A2 was read from another A2\.tsv"):
        one(runs)


def test_protocols_and_data_sets_are_tables_of_their_own(tmp_path: Path) -> None:
    folders = write_folds(tmp_path / "x") + write_folds(tmp_path / "y", **{"protocol.truth": "gene"})
    folders += write_folds(tmp_path / "z", **{"protocol.spot_context": "batch"}, seed=1)  # of the method, as k is
    tables = tabulate_all([read_scored_run(folder) for folder in folders])
    assert [table.title for table in tables] == [
        "demo, protocol strict, truth=spot",
        "demo, protocol strict, truth=gene",
    ]
    assert [row(table, "mclstexp")["n_seeds"] for table in tables] == [2, 1]


def test_the_scoring_of_another_protocol(tmp_path: Path) -> None:
    other = {"A1": 0.7, "A2": 0.9}
    folder = write_run(tmp_path / "x", {"A1": 0.1, "A2": 0.2}, other=other)
    table = one([folder], scored_as="paper")
    assert table.title == "demo, protocol strict, scored as paper" and row(table, "mclstexp")["pearson_acg"] == 0.8
    with pytest.raises(InputError, match="not scored as blocks, only as strict, paper"):
        read_scored_run(folder, "blocks")
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["scored_as"]["paper"] = {"scores": scores(0.8), "floors": {}, "ceiling": {}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(InputError, match=f"not kept by section; do that with stexp-score run={folder}"):
        read_scored_run(folder, "paper")


def test_runs_whose_predictions_changed_are_said(runs: list[Path]) -> None:
    assert "changed since the run" not in markdown(one(runs))
    adata = ad.AnnData(layers={"predicted": np.ones((2, 3), np.float32)}, shape=(2, 3))
    predictions.write(adata, runs[1] / "predictions.h5ad")
    for recorded, changed in ((predictions.digest(adata), False), ("another", True)):
        provenance = json.loads((runs[1] / "provenance.json").read_text()) | {predictions.DIGEST: recorded}
        (runs[1] / "provenance.json").write_text(json.dumps(provenance))
        text = markdown(one(runs))
        assert (f"{runs[1]}." in text and "changed since the run" in text) == changed


def test_too_few_units_are_said(runs: list[Path], tmp_path: Path) -> None:
    text = markdown(one(runs))
    assert "4 sections: smallest possible p 0.12, 0.25 after Holm" in text
    assert "bootstrap of 3 patients, then of their sections, too narrow" in text
    pair = [write_run(tmp_path / name, {"A1": 0.1, "A2": 0.3}, model=name) for name in ("x", "y")]
    assert "within 1 patient" in markdown(one(pair))
    single = [write_run(tmp_path / name, {"B1": 0.1}, model=name) for name in ("v", "w")]
    assert "No interval: no patient has two sections" in markdown(one(single))


def test_golden_table(runs: list[Path]) -> None:
    table = one(runs)
    lines = markdown(table).splitlines()
    assert lines[0] == "## demo, protocol strict"
    assert lines[2] == "4 sections of 3 patients (A, B, C), 3 folds (A, B, C), 2 genes."
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines if "|" in line
    }
    assert "**0.350 ± 0.129 (0.126)**" in "\n".join(lines)
    assert next(line for line in lines if line.startswith("| **ours**")).count("**") == 4
    assert cells["ceiling: counting noise"][:2] == ["0.800 ± 0.000 (0.000)", "0.900 ± 0.000 (0.000)"]
    assert cells["oracle: depth oracle"][-1] == ""
    tex = latex(table)
    assert r"\textbf{ours} & \textbf{0.350 $\pm$ 0.129 (0.126)} & 0.350" in tex
    for name in ("table", "tabular"):
        assert tex.count(rf"\begin{{{name}}}") == tex.count(rf"\end{{{name}}}") == 2
    assert all(line.count(" & ") == 6 for line in tex.splitlines() if line.startswith("floor: "))


def test_size_counts_what_trains_apart() -> None:
    frozen = torch.nn.Linear(19, 5).requires_grad_(False)
    model = torch.nn.Sequential(frozen, torch.nn.Linear(6, 1), torch.nn.Linear(6, 1))
    size = size_of_training(SimpleNamespace(lightning_module=model, current_epoch=3))
    assert size == {"epochs": 3, "parameters": {"total": 114, "trained": 14}}
    correction = Correction(6, 4)
    n = sum(parameter.numel() for parameter in correction.parameters())
    size = size_of_training(SimpleNamespace(lightning_module=model.append(correction), current_epoch=3))
    assert size["parameters"] == {"total": 114 + n, "trained": 14 + n}, "it trains after the fit"


def test_latex_escapes_what_it_must(tmp_path: Path) -> None:
    tex = latex(one(write_folds(tmp_path, model="50%_a&b#{c}~^\\")))
    assert r"50\%\_a\&b\#\{c\}\textasciitilde{}\textasciicircum{}\textbackslash{}" in tex


def test_folders_patterns_and_what_is_not_finished(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "ours" / "A" / "rescored" / "k=3").mkdir(parents=True)
    (tmp_path / "ours" / "A" / "rescored" / "k=3" / "config.yaml").write_text("{}")
    (tmp_path / "notes.txt").write_text("")
    assert find_runs([str(tmp_path)]) == (runs, [])
    assert find_runs([f"{tmp_path}/*", str(runs[0])]) == (runs, [])
    assert find_runs([f"{tmp_path}/th*/[AB]"])[0] == runs[3:5]
    (runs[0] / "metrics.json").unlink()
    assert find_runs([str(tmp_path)]) == (runs[1:], [])  # it never came to train
    assert find_runs([str(runs[0])]) == ([], runs[:1])  # but was asked for
    (runs[0] / "checkpoints").mkdir()
    assert find_runs([str(tmp_path)]) == (runs[1:], runs[:1])
    for pattern, says in (
        (str(tmp_path / "none*"), "nothing is called"),
        (str(runs[0] / "rescored" / "none"), "nothing"),
    ):
        with pytest.raises(InputError, match=says):
            find_runs([pattern])
    (tmp_path / "kept.json").write_text("{}")
    with pytest.raises(InputError, match="name the run's folder"):
        find_runs([str(tmp_path / "kept.json")])
    with pytest.raises(InputError, match="holds no run"):
        find_runs([str(tmp_path / "notes.txt")])


def test_a_baseline_that_is_no_row_is_refused_with_those_there(runs: list[Path]) -> None:
    with pytest.raises(InputError, match="baseline=nearest is no row here; choose ours, theirs, floor: colour ridge"):
        one(runs, baseline="nearest")


@pytest.mark.slow
def test_command_writes_the_files_without_torch(runs: list[Path], tmp_path: Path) -> None:
    code = "import sys; from stexp.cli.table import main; main(); assert 'torch' not in sys.modules, 'torch'"
    arguments = [f"runs={tmp_path}", f"output_dir={tmp_path / 'out'}"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)
    assert (tmp_path / "out" / "table.md").read_text().split("\n", 2)[2].strip() in done.stdout
    with open(tmp_path / "out" / "comparison.csv") as file:
        first = next(csv.DictReader(file))
    assert (first["table"], first["method"], float(first["difference"])) == ("demo, protocol strict", "ours", 0.2)
    by_section = pd.read_csv(tmp_path / "out" / "sections.csv")
    assert by_section.loc[by_section["label"] == "ours", "pearson_acg"].mean() == pytest.approx(0.35)

    (runs[0] / "metrics.json").unlink()
    (runs[0] / "checkpoints").mkdir()
    finish = f"{runs[0]} is not finished; finish it with: stexp-train -cp {runs[0]} -cn config"
    for more, status, n_lines in ((["allow_missing=false"], 2, 1), ([], 0, 2)):
        done = warm.run([sys.executable, "-m", "stexp.cli.table", *arguments, *more], capture_output=True, text=True)
        lines = done.stderr.splitlines()
        assert done.returncode == status and len(lines) == n_lines and finish in lines[0]
    assert "ours, seed 0, lacks fold A" in lines[1] and "stexp-train data=demo model=ours fold=A" in lines[1]
    assert "Gap: ours, seed 0, lacks fold A." in done.stdout and "| theirs" in done.stdout


def test_a_table_of_genes_that_is_cut_and_a_config_that_is_cut_are_one_line(runs: list[Path]) -> None:
    path = runs[0] / "per_gene.csv"
    whole = path.read_text()
    path.write_text(whole.splitlines()[0] + "\n")
    with pytest.raises(InputError, match=r"per_gene\.csv names no gene; score the run again"):
        read_scored_run(runs[0])
    path.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match=r"per_gene\.csv has 1 of 2 genes; write it again"):
        read_scored_run(runs[0])
    path.write_text(whole)
    (runs[0] / "config.yaml").write_text("data: {name: x}\n")
    with pytest.raises(InputError, match=r"config\.yaml has no seed, fold, protocol"):
        read_scored_run(runs[0])


def test_links_that_lead_back_are_not_followed(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "theirs" / "up").symlink_to(tmp_path)
    assert find_runs([str(tmp_path)])[0] == find_runs([str(folder) for folder in runs])[0]


def test_what_stands_behind_a_row(tmp_path: Path) -> None:
    folders = write_folds(tmp_path)
    for folder in folders:
        metrics = json.loads((folder / "metrics.json").read_text())
        for name, part in metrics["sections"].items():
            part["scores"] |= {"mse_within_gene": 1.0, "mse_gene_mean": 0.5, "follows_depth": 0.3}
            part["floors"]["mean"] |= {"mse_within_gene": 4.0 if name == "A2" else 2.0, "mse_gene_mean": 0.4}
        metrics["evidence"] = {
            "intervals": {},
            "error": {},
            "structure": {"moran_concordance": 0.4},
            "chance": {"n_genes": 2, "n_beyond": 1, "false_discoveries": 0.05, "pearson_moved": 0.0},
            "strata": [],
            "measurable": {"n_genes": 2, "pearson": 0.1},
            "gene_sets": [
                {"set": name, "n_genes": 2, "genes": [], "pearson": value, "floors": {"colour_ridge": 0.1}}
                for name, value in (("x", 0.5), ("y", 0.0))
            ],
        }
        (folder / "metrics.json").write_text(json.dumps(metrics))
    table = one(folders)
    method, floor = table.rows[table.rows["kind"] == "method"].iloc[0], row(table, "floor: colour ridge")
    assert method["skill_within_gene"] == pytest.approx(1 - 4 / 10)
    assert method["skill_gene_mean"] == pytest.approx(1 - 0.5 / 0.4)
    assert method["share_of_ceiling"] == pytest.approx(0.25 / 0.8)
    assert floor["share_of_ceiling"] == pytest.approx(0.15 / 0.8)
    assert method["gene_sets"] == pytest.approx(0.25) and floor["gene_sets"] == pytest.approx(0.1)
    assert method["beyond_chance"] == 0.5 and method["moran_concordance"] == pytest.approx(0.4)
    assert method["follows_depth"] == pytest.approx(0.3) and "(3 patients, covers about 75 %)" in method["interval"]
    cells = next(line for line in markdown(table).splitlines() if "60 %" in line)
    assert "-25 %" in cells and "31 %" in cells and "50 %" in cells


def test_floors_that_differ_name_what_they_are_of_and_not_whose_predictions_stand_beside_them() -> None:
    floors = {"narrow": 0.1, "theirs": 0.1, "wide": 0.2}
    common = {"kind": "floor", "name": "knn features", "fold": "B", "section": "B1"}
    table = pd.DataFrame([common | {"of": of, "pearson_acg": score} for of, score in floors.items()])
    of_two_encoders, of_one = table.copy(), table.copy()
    rows._name_floors(of_two_encoders, {"narrow": "resnet18", "theirs": "theirs", "wide": "densenet121"})
    rows._name_floors(of_one, {"narrow": "resnet18", "theirs": "theirs", "wide": "resnet18"})
    assert list(of_two_encoders["name"]) == [f"knn features ({n})" for n in ("resnet18", "resnet18", "densenet121")]
    assert list(of_one["name"]) == [f"knn features ({n})" for n in ("narrow, theirs", "narrow, theirs", "wide")]
