"""The main job, from sections to report, on small demo data."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from stexp import InputError, callbacks, config
from stexp.data.splits import folds
from stexp.provenance import Stages
from stexp.report import write_report
from stexp.rescore import predict_again
from stexp.score import main as score_main
from stexp.score import score_run
from stexp.train import main, train

RUN_FOLDER = {
    "config.yaml",
    "predictions.h5ad",
    "floors.h5ad",
    "embeddings.h5ad",
    "metrics.json",
    "per_gene.csv",
    "audit.json",
    "report.html",
    "provenance.json",
}


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """Root of a demo data set: three patients with one section each."""
    root = tmp_path_factory.mktemp("demo")
    config.load_sections(configure(root, root / "unused"), config.build(configure(root, root / "unused").protocol))
    return root


def configure(root: Path, out: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        return compose(
            "train",
            [
                "data=demo",
                f"data.root={root / 'data'}",
                f"data.cache_dir={root / 'cache'}",
                "data.reader.patients=3",
                "data.reader.sections_per_patient=1",
                f"output_dir={out}",
                "trainer.max_epochs=2",
                "trainer.accelerator=cpu",
                "hardware.keep_memory=false",
                *overrides,
            ],
        )


def run(root: Path, out: Path, *overrides: str, fold: str | None = None) -> dict:
    cfg = configure(root, out, *overrides)
    protocol = config.build(cfg.protocol)
    sections = config.load_sections(cfg, protocol)
    return train(cfg, sections, fold or folds(sections, protocol)[0], out)


@pytest.fixture(scope="session")
def strict(demo: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "strict"
    run(demo, out, "trainer.max_epochs=4")
    return out


def test_run_folder_is_complete_and_beats_the_mean(strict: Path) -> None:
    assert {path.name for path in strict.iterdir()} >= RUN_FOLDER
    assert {path.name for path in (strict / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    metrics = json.loads((strict / "metrics.json").read_text())
    assert metrics["protocol"] == "strict" and metrics["fold"] == "A"
    assert metrics["scores"]["pearson_acg"] > 0.15, "morphology explains a third of the demo's genes"
    assert metrics["scores"]["mse"] < metrics["floors"]["mean"]["mse"]
    assert set(metrics["floors"]) == {
        "mean",
        "nearest_section",
        "depth_oracle",
        "colour_ridge",
        "coordinates",
        "knn_features",
        "ridge_features",
    }
    assert metrics["scores"]["pearson_acg"] < metrics["ceiling"]["pearson_acg"] <= 1
    assert metrics["scored_as"]["paper"]["scores"]["mse"] is None, "another scale: errors would mean nothing"
    assert json.loads((strict / "audit.json").read_text())["leaks"] == 0


def test_genes_that_morphology_cannot_explain_stay_unexplained(strict: Path, demo: Path) -> None:
    genes = pd.read_csv(strict / "per_gene.csv").merge(pd.read_csv(demo / "data" / "genes.csv"), on="gene")
    mean = genes.groupby("family")["pearson"].mean()
    assert mean["full"] > mean["part"] > mean["none"] + 0.1
    assert abs(mean["none"]) < 0.05


def test_predictions_hold_each_test_spot_once_and_open_in_scanpy(strict: Path) -> None:
    import scanpy as sc

    adata = ad.read_h5ad(strict / "predictions.h5ad")
    assert adata.obs_names.is_unique and set(adata.obs["patient"]) == {"A"}
    assert np.isfinite(adata.layers["uncertainty"]).all() and (adata.layers["uncertainty"] >= 0).all()
    assert not set(adata.obs["neighbour_patient"]) & {"A"}
    axes = sc.pl.spatial(adata, color=adata.var_names[0], library_id="A1", show=False)
    assert len(axes) == 1


def test_checkpoint_is_plain_and_says_what_it_needs(strict: Path) -> None:
    checkpoint = torch.load(strict / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["method"] == {"name": "mclstexp", "image_encoder": "test_resnet"}
    about = checkpoint["SpotDataModule"]
    assert about["panel"] == list(ad.read_h5ad(strict / "predictions.h5ad").var_names)
    assert about["protocol"]["name"] == "strict" and about["tile_um"] == 120 and about["array_size"] > 1


def test_interrupted_run_ends_as_an_uninterrupted_one(strict: Path, demo: Path, tmp_path: Path, monkeypatch) -> None:
    def stop(self, trainer, model, outputs, batch, batch_idx):
        if trainer.current_epoch == 2 and batch_idx == 1:
            raise RuntimeError("killed")

    out = tmp_path / "resumed"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(callbacks.EpochLines, "on_train_batch_end", stop)
        run(demo, out, "trainer.max_epochs=4")
    assert not (out / "metrics.json").exists()
    run(demo, out, "trainer.max_epochs=4")
    for name in ("metrics.json", "per_gene.csv", "audit.json"):
        assert (out / name).read_bytes() == (strict / name).read_bytes(), name
    ours, theirs = (ad.read_h5ad(folder / "predictions.h5ad") for folder in (out, strict))
    assert np.array_equal(ours.layers["predicted"], theirs.layers["predicted"])
    first, second = (pd.read_csv(out / "logs" / "csv" / f"version_{i}" / "metrics.csv")["epoch"] for i in (0, 1))
    assert first.max() == 2 and (second.min(), second.max()) == (2, 3), "the log goes on where it stopped"


@pytest.mark.slow
def test_same_seed_gives_identical_files(demo: Path, tmp_path: Path, strict: Path) -> None:
    for name in ("a", "b"):
        run(demo, tmp_path / name, "trainer.max_epochs=1")
    for name in ("metrics.json", "per_gene.csv", "audit.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    a, b = (ad.read_h5ad(tmp_path / name / "predictions.h5ad") for name in ("a", "b"))
    for layer in a.layers:
        assert np.array_equal(a.layers[layer], b.layers[layer], equal_nan=True), layer
    other = run(demo, tmp_path / "c", "trainer.max_epochs=1", "seed=1")
    assert other["scores"] != json.loads((tmp_path / "a" / "metrics.json").read_text())["scores"]


def test_finished_run_is_not_run_again_and_another_config_is_refused(strict: Path, demo: Path) -> None:
    before = (strict / "predictions.h5ad").stat().st_mtime_ns
    run(demo, strict, "trainer.max_epochs=4")
    assert (strict / "predictions.h5ad").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"another config \(model\.lr"):
        run(demo, strict, "trainer.max_epochs=4", "model.lr=0.01")


def test_a_finished_run_whose_data_changed_is_said_to_be_old(strict: Path, demo: Path, tmp_path, monkeypatch) -> None:
    cfg = configure(demo, strict, "trainer.max_epochs=4")
    a, b, c = config.load_sections(cfg, config.build(cfg.protocol))
    other = tmp_path / b.files[1].name
    other.write_text("another content under the same name")
    for sections, changed in (
        ([a, replace(b, files=(b.files[0], other, *b.files[2:])), c], "B1"),
        ([a, b, replace(c, patient="D")], "C1"),
        ([a, c], "B1"),
        ([a, b, c, replace(b, name="B2")], "B2"),
    ):
        with pytest.raises(InputError, match=rf"is finished, and its data changed since \({changed}\); choose another"):
            train(cfg, sections, "A", strict)
        monkeypatch.setattr("stexp.rescore.load_sections", lambda *_, sections=sections: sections)
        with pytest.raises(InputError, match=rf"changed since .* \({changed}\); train again"):
            predict_again(strict, {"k": 5}, "panel", str(tmp_path / "again"))
    train(cfg, [a, b, c, replace(b, name="B2", slide=None)], "A", strict)  # which the split may have left out


def copy_of(strict: Path, folder: Path) -> Path:
    """A run folder elsewhere, with a config that says so."""
    shutil.copytree(strict, folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace(str(strict), str(folder)))
    return folder


@pytest.mark.parametrize(
    ("name", "content", "commands", "says"),
    [
        ("config.yaml", b"", "retrieve train", "cannot be read: it holds no keys; train again with overwrite=true"),
        ("config.yaml", b"- 1\n", "retrieve train", "cannot be read"),
        ("config.yaml", b"\x89HDF\xff\x00", "retrieve train", "cannot be read"),
        ("audit.json", b'{"protocol": ', "retrieve report train", "audit.json cannot be read"),
        ("audit.json", b"{}", "retrieve train", "audit.json has no facts"),
        ("metrics.json", b'{"scores"', "report", "metrics.json cannot be read"),
        ("provenance.json", b"[1]", "retrieve report train", "provenance.json is no JSON object"),
        ("provenance.json", b"{}", "retrieve report train", "lack|has no"),
        ("per_gene.csv", b"", "report", "per_gene.csv names no gene"),
        ("per_gene.csv", b"\x00\xff\xfe", "report", "per_gene.csv is not a table of numbers"),
        ("predictions.h5ad", b"\x89HDF\r\n", "score retrieve report train", "predictions.h5ad cannot be read"),
        ("floors.h5ad", b"", "score train", "floors.h5ad cannot be read"),
        ("embeddings.h5ad", b"x", "retrieve", "embeddings.h5ad cannot be read"),
    ],
)
def test_a_damaged_file_of_a_run_is_one_line(strict, demo, tmp_path, name, content, commands, says) -> None:
    folder = copy_of(strict, tmp_path / "run")
    (folder / name).write_bytes(content)
    run_command = {
        "score": score_run,
        "retrieve": lambda folder: predict_again(folder, {"k": 5}, "panel", None),
        "report": write_report,
        "train": lambda folder: run(demo, folder, "trainer.max_epochs=4"),
    }
    for command_ in commands.split():
        with pytest.raises(InputError, match=says) as caught:
            run_command[command_](folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("predictions.h5ad", lambda a: a.layers.pop("counts"), "has no layers/counts; delete it and give the command"),
        ("predictions.h5ad", lambda a: a.uns["stexp"].pop("fold"), "has no uns/stexp/fold"),
        ("predictions.h5ad", lambda a: a.uns.pop("stexp"), "has no uns/stexp/protocol, uns/stexp/fold"),
        ("floors.h5ad", lambda a: a[:-1].copy(), "is of other spots than predictions.h5ad"),
        ("floors.h5ad", lambda a: a[:, 1:].copy(), "is of other genes than predictions.h5ad"),
        ("floors.h5ad", lambda a: a.layers.pop("strict:mean"), "has no floors under protocol strict"),
        ("floors.h5ad", lambda a: a.uns["ceiling"]["paper"].pop("A1"), "has no ceiling of section A1 under protocol p"),
        ("floors.h5ad", lambda a: a.uns.pop("ceiling"), "has no uns/ceiling"),
    ],
)
def test_a_prediction_file_that_lacks_something_says_what(strict: Path, tmp_path: Path, name, damage, says) -> None:
    for file in ("predictions.h5ad", "floors.h5ad"):
        adata = ad.read_h5ad(strict / file)
        if file == name:
            left = damage(adata)
            adata = left if isinstance(left, ad.AnnData) else adata
        adata.write_h5ad(tmp_path / file)
    with pytest.raises(InputError, match=rf"{name} {says}"):
        score_run(tmp_path)


def test_what_is_deleted_from_a_finished_run_is_made_again(strict: Path, demo: Path, tmp_path: Path) -> None:
    folder = copy_of(strict, tmp_path / "run")
    for name in ("predictions.h5ad", "provenance.json", "audit.json"):
        (folder / name).unlink()
    assert run(demo, folder, "trainer.max_epochs=4") == json.loads((strict / "metrics.json").read_text())
    assert (folder / "audit.json").read_bytes() == (strict / "audit.json").read_bytes()
    ours, theirs = (ad.read_h5ad(path / "predictions.h5ad") for path in (folder, strict))
    assert np.array_equal(ours.layers["predicted"], theirs.layers["predicted"])
    (folder / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"holds checkpoints or predictions, but no config\.yaml"):
        run(demo, folder, "trainer.max_epochs=4", "overwrite=true")
    (folder / "stages.json").write_text("{")
    with pytest.raises(InputError, match=r"stages\.json cannot be read: .*; delete it and give the command that made"):
        Stages(folder)


def test_choosing_genes_leaves_the_number_of_threads(demo: Path, tmp_path: Path, monkeypatch) -> None:
    seen = []

    def stop(*_) -> None:
        seen.append(torch.get_num_threads())
        raise RuntimeError("far enough")

    monkeypatch.setattr("stexp.data.features.frozen_features", stop)
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="far enough"):
        run(demo, tmp_path / "run")
    assert seen == [before]


def test_all_folds_end_with_one_table(demo: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def scored(acg: float | None, floor: float) -> dict:
        def scores(value):
            return {"pearson_acg": value, "pearson_heg50": value and value + 0.1}

        floors = {"mean": scores(0.0), "colour_ridge": scores(floor), "depth_oracle": scores(0.9)}
        return {"data": "demo", "model": "m", "protocol": "strict", "scores": scores(acg), "floors": floors}

    made = {"A": scored(0.2, 0.1), "B": scored(0.4, -0.1), "C": scored(None, 0.2)}
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)  # its handler would outlive the captured stream
    monkeypatch.setattr("stexp.train.train", lambda cfg, sections, fold, folder: made[fold] | {"fold": folder.name})
    main.__wrapped__(configure(demo, tmp_path, "fold=all"))
    head, _, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert " ".join(head) == "demo, m, protocol strict: 3 folds"
    assert rows == [
        ["A", "0.2000", "0.3000", "colour_ridge", "0.1000", "0.2000"],
        ["B", "0.4000", "0.5000", "mean", "0.0000", "0.0000"],
        ["C", "-", "-", "colour_ridge", "0.2000", "0.3000"],
        ["mean", "0.3000", "0.4000", "0.1000", "0.1667"],
    ]


def test_an_output_folder_for_no_new_prediction_is_refused(strict: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("score", [f"run={strict}", f"output_dir={tmp_path / 'y'}"])
    with pytest.raises(SystemExit):
        score_main.__wrapped__(cfg)
    assert "output_dir is for new predictions; change something" in capsys.readouterr().err
    assert not (tmp_path / "y").exists()


def test_paper_protocol_names_its_leaks(demo: Path, tmp_path: Path) -> None:
    metrics = run(demo, tmp_path / "paper", "protocol=paper", "protocol.k=50", "trainer.max_epochs=1", fold="B1")
    assert metrics["protocol"] == "paper" and set(metrics["scored_as"]) == {"strict"}
    assert not (tmp_path / "paper" / "checkpoints" / "best.ckpt").exists(), "no validation, no best"
    leaks = {
        item["name"] for item in json.loads((tmp_path / "paper" / "audit.json").read_text())["items"] if item["leak"]
    }
    # one section a patient: nothing of the patient is left to leak
    assert leaks == {
        "panel_saw_test",
        "heg_saw_test",
        "truth_scaled_by_test_section",
        "spot_embedding_depends_on_batch",
        "settings_chosen_on_test",
    }


def test_scoring_again_gives_the_same_and_needs_no_torch(strict: Path) -> None:
    before = (strict / "metrics.json").read_bytes()
    code = (
        f"import sys; from pathlib import Path; from stexp.score import score_run; score_run(Path({str(strict)!r})); "
        "assert 'torch' not in sys.modules, 'scoring imports torch'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (strict / "metrics.json").read_bytes() == before


def test_retrieval_again_with_the_same_settings_gives_the_same(strict: Path, tmp_path: Path) -> None:
    k = json.loads((strict / "metrics.json").read_text())["chosen"]["k"]
    same = predict_again(strict, {"k": k}, "panel", str(tmp_path / "same"))
    ours, theirs = (ad.read_h5ad(folder / "predictions.h5ad") for folder in (same, strict))
    np.testing.assert_allclose(ours.layers["predicted"], theirs.layers["predicted"], atol=1e-5)
    assert score_run(same)["floors"] == json.loads((strict / "metrics.json").read_text())["floors"]

    one = predict_again(strict, {"k": 1, "weighting": "mean"}, "panel", str(tmp_path / "one"))
    assert (ad.read_h5ad(one / "predictions.h5ad").obs["neighbour_effective_k"] == 1).all()
    assert json.loads((one / "audit.json").read_text())["facts"]["k_chosen_on"] == "after_scoring"
    with pytest.raises(InputError, match="not on the training side"):
        predict_again(strict, {"reference": ["A1"]}, "panel", str(tmp_path / "leak"))


def test_genes_outside_the_panel_are_predicted(demo: Path, tmp_path: Path) -> None:
    panel = tmp_path / "panel.txt"
    panel.write_text("TUMOUR01\nSTROMA01\nHIDDEN01\n")
    run(demo, tmp_path / "few", f"data.panel_file={panel}", "data.panel_saw_test=false", "trainer.max_epochs=2")
    more = predict_again(tmp_path / "few", {}, ["TUMOUR02", "FAT01"], None)
    adata = ad.read_h5ad(more / "predictions.h5ad")
    assert list(adata.var_names) == ["TUMOUR02", "FAT01"]
    assert score_run(more)["n_genes"] == 2
    with pytest.raises(InputError, match=r"1 of 1 genes .*NOGENE"):
        predict_again(tmp_path / "few", {}, ["NOGENE"], None)


def command(name: str, *overrides: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"stexp.{name}", *overrides],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["fold=Z"], "fold=Z is no patient with an image; choose one of A, B, C, or all"),
        (["fold=A1"], "A1 is a section of patient A"),
        (["data.sections=[A1]", "fold=A"], "no section with an image is left to train on"),
        (["data.sections=[A1,X9]"], "X9 not in demo"),
        (["model.k=100000"], "reference spots; choose 1 to"),
        (["model.distance=l3"], "choose cosine, l1, l2"),
        (["fold=2_0"], "fold=20 is no patient with an image"),
        (["trainer.max_epochs=0"], "trainer.max_epochs=0: a whole number of at least 1 would fit"),
        (["trainer.max_epochs=-1"], "trainer.max_epochs=-1: a whole number of at least 1 would fit"),
        (["hardware.threads=-1"], "hardware.threads=-1: a whole number of at least 1 would fit"),
        (["seed=-1"], "seed=-1: a whole number of at least 0 would fit"),
        (["data.tile_um=-5"], "data.tile_um=-5: a length above 0 in micrometres, or null, would fit"),
        (["data.tile_um=wide"], "data.tile_um=wide: a length above 0 in micrometres, or null, would fit"),
        (["data.tile_um=1e6"], "a tile of 500000 px is larger than the image (1750 x"),
        (["trainer.accelerator=gpu"], "no GPU here; take cpu or auto"),
        (["trainer.accelerator=tpu"], "choose auto, cpu or gpu"),
        (["data.augmentation=all"], "choose none, dihedral, paper"),
        (["image_encoder.name=densnet121"], "timm has no model 'densnet121'"),
        (["image_encoder.pretrained=true", "image_encoder.checkpoint=nowhere.safetensors"], "does not exist"),
        (["data.panel_file=nowhere.txt"], "panel file nowhere.txt does not exist"),
        (["+model.kk=3"], "takes no key 'kk'; did you mean 'k'?"),
    ],
)
def test_bad_input_is_one_clear_line(demo: Path, tmp_path: Path, overrides: list[str], says: str) -> None:
    cfg = configure(demo, tmp_path / "run", *overrides)
    with pytest.raises(InputError) as error:
        sections = config.load_sections(cfg, config.build(cfg.protocol))
        train(cfg, sections, str(cfg.fold or "A"), tmp_path / "run")
    assert says in str(error.value) and "\n" not in str(error.value)


def test_command_line_ends_with_status_2_and_one_line(demo: Path, tmp_path: Path) -> None:
    done = command(
        "train",
        f"data.root={demo / 'data'}",
        "data.reader.patients=3",
        "data.reader.sections_per_patient=1",
        f"data.cache_dir={demo / 'cache'}",
        "fold=Z",
        f"output_dir={tmp_path / 'run'}",
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("stexp: error: fold=Z")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["train", "score", "floors", "prepare", "report"])
def test_help_teaches_without_importing_torch(name: str) -> None:
    code = (
        f"import sys, runpy\nsys.argv = ['stexp-{name}', '--help']\n"
        f"try:\n    runpy.run_module('stexp.{name}', run_name='__main__')\n"
        "except SystemExit:\n    pass\nassert 'torch' not in sys.modules, 'help imports torch'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"stexp-{name}" in done.stdout and len(done.stdout.splitlines()) > 3


def test_prepare_and_floors_print_what_they_found(demo: Path, tmp_path: Path) -> None:
    common = [f"data.root={demo / 'data'}", "data.reader.patients=3", "data.reader.sections_per_patient=1"]
    folder = tmp_path / "prepared"
    prepared = command("prepare", *common, f"data.cache_dir={demo / 'cache'}", f"output_dir={folder}")
    assert {path.name for path in folder.iterdir()} == {"qc.csv", "spots.csv.gz", "overlay", "overlay.png"}
    assert prepared.returncode == 0 and "demo: 3 sections of 3 patients" in prepared.stdout
    floors = command("floors", *common)
    assert floors.returncode == 0 and "depth_oracle (oracle)" in floors.stdout


def test_config_of_a_run_is_data(strict: Path, tmp_path: Path) -> None:
    cfg = config.load_run(strict)
    assert OmegaConf.to_container(cfg)["fold"] == "A"
    (tmp_path / "config.yaml").write_text("model: {_target_: os.system, command: 'touch owned'}\n")
    loaded = config.load_run(tmp_path)
    with pytest.raises(InputError, match="not allowed"):
        config.build(loaded.model)
    with pytest.raises(InputError, match="no run folder"):
        config.load_run(tmp_path / "nowhere")


@pytest.mark.slow
@pytest.mark.data
def test_floors_of_her2st_are_those_of_the_docs(real_data: Path) -> None:
    done = command("floors", "data=her2st", "protocol=paper", STEXP_DATA=str(real_data))
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()[2:]}
    assert rows["depth_oracle"][2:4] == ["0.3037", "0.5810"]
    assert rows["mean"][3:5] == ["0.7115", "0.6716"]


def test_a_damaged_cache_is_made_again(demo: Path, tmp_path: Path) -> None:
    first = run(demo, tmp_path / "a", "trainer.max_epochs=1", f"data.cache_dir={tmp_path / 'cache'}")
    for path in [*(tmp_path / "cache").rglob("*.npy")]:
        path.write_bytes(path.read_bytes()[:200])
    again = run(demo, tmp_path / "b", "trainer.max_epochs=1", f"data.cache_dir={tmp_path / 'cache'}")
    assert again["scores"] == first["scores"]


def test_a_damaged_checkpoint_is_said_in_one_line(demo: Path, tmp_path: Path, monkeypatch) -> None:
    def stop(self, trainer, model):
        raise RuntimeError("killed")

    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr("stexp.models.mclstexp.MclSTExp.on_predict_start", lambda self: stop(self, None, None))
        run(demo, out, "trainer.max_epochs=1")
    last = out / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    with pytest.raises(InputError, match=r"last\.ckpt is damaged"):
        run(demo, out, "trainer.max_epochs=1")


def test_a_protocol_in_a_prediction_file_is_never_called(strict: Path, tmp_path: Path) -> None:
    adata = ad.read_h5ad(strict / "predictions.h5ad")
    adata.uns["stexp"]["protocol"] = json.dumps({"_target_": "os.system", "command": f"touch {tmp_path / 'owned'}"})
    folder = tmp_path / "hostile"
    folder.mkdir()
    adata.write_h5ad(folder / "predictions.h5ad")
    (folder / "floors.h5ad").write_bytes((strict / "floors.h5ad").read_bytes())
    with pytest.raises(InputError, match="do not say their protocol"):
        score_run(folder)
    assert not (tmp_path / "owned").exists()
    with pytest.raises(InputError, match="not allowed"):
        config.build(
            {"_target_": "pytorch_lightning.cli.instantiate_class", "args": [], "init": {"class_path": "os.system"}}
        )


def test_a_method_needs_no_more_than_the_recipe_says(demo: Path, tmp_path: Path, monkeypatch) -> None:
    class Mean(pl.LightningModule):
        """One number a gene, learned: CONTRIBUTING.md's recipe and nothing else."""

        def __init__(self, n_genes: int, n_positions: int) -> None:
            super().__init__()
            self.mean = torch.nn.Parameter(torch.zeros(n_genes))

        def training_step(self, batch, batch_idx):
            return (self.mean - batch.target).square().mean()

        def predict_step(self, batch, batch_idx=0):
            return {"predicted": self.mean.detach().expand_as(batch.target)}

        validation_step = predict_step

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.3)

    module = ModuleType("stexp.models.mean")
    module.Mean, Mean.__module__ = Mean, module.__name__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    cfg = configure(demo, tmp_path / "mean", "trainer.max_epochs=6", "protocol.validation=false")
    OmegaConf.set_struct(cfg, False)
    cfg.model = {"_target_": "stexp.models.mean.Mean", "name": "mean"}
    sections = config.load_sections(cfg, config.build(cfg.protocol))
    metrics = train(cfg, sections, "A", tmp_path / "mean")
    assert metrics["scores"]["pearson_acg"] == 0, "a constant has no skill"
    assert metrics["scores"]["mse"] < 1.5 * metrics["floors"]["mean"]["mse"]
    assert not (tmp_path / "mean" / "embeddings.h5ad").exists()
    with pytest.raises(InputError, match="does not retrieve"):
        predict_again(tmp_path / "mean", {"k": 5}, "panel", None)
