"""Run folders that are finished, damaged, or of other data: taken up, made whole, or refused in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import yaml
from demo_run import configure, run
from hydra import compose, initialize_config_dir

from stexp import config, files
from stexp.cli.fold import train
from stexp.cli.score import main as score_main
from stexp.data.dataset import DataSet
from stexp.errors import InputError
from stexp.evaluation.contrast import read_contrast
from stexp.reporting.report import write_report
from stexp.runs.folder import RunFolder
from stexp.runs.provenance import Stages
from stexp.runs.rescore import predict_again
from stexp.runs.scoring import score_run


def test_finished_run_is_not_run_again_and_another_config_is_refused(strict: Path, demo: Path) -> None:
    before = (strict / "predictions.h5ad").stat().st_mtime_ns
    run(demo, strict, "trainer.max_epochs=4")
    assert (strict / "predictions.h5ad").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"another config \(model\.lr"):
        run(demo, strict, "trainer.max_epochs=4", "model.lr=0.01")


def test_other_random_features_of_a_finished_run_are_said(strict: Path, tmp_path: Path, caplog) -> None:
    run_folder = RunFolder(copy_of(strict, tmp_path / "run"))
    configs = [{**run_folder.config, "random_features": n} for n in (run_folder.config["random_features"], 1)]
    assert run_folder.claim(configs[0], overwrite=False) and not caplog.text
    assert run_folder.claim(configs[1], overwrite=False) and "and not 1" in caplog.text
    assert run_folder.config["random_features"] == configs[0]["random_features"]
    (run_folder.path / "floors.h5ad").unlink()  # what is still to be made is made as asked
    assert not run_folder.claim(configs[1], overwrite=False)
    assert run_folder.config["random_features"] == 1


def test_a_finished_run_whose_data_changed_is_said_to_be_old(strict: Path, demo: Path, tmp_path, monkeypatch) -> None:
    cfg = configure(demo, strict, "trainer.max_epochs=4")
    a, b, c = config.dataset_of(cfg).read_sections(config.build(cfg.protocol))
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
        monkeypatch.setattr(DataSet, "read_sections", lambda *_, sections=sections: sections)
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
        ("audit.json", b"{}", "retrieve train", "audit.json has no leaks, items, facts"),
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
        (
            "predictions.h5ad",
            lambda a: a.layers.pop("counts"),
            "has no layers/counts, or it is of another kind; delete it and give the command",
        ),
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


@pytest.mark.slow
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


def test_what_a_training_learned_of_matching_goes_with_it_and_with_no_other(strict: Path, tmp_path: Path) -> None:
    epochs = read_contrast(strict)
    again = predict_again(strict, {"k": 7}, "panel", str(tmp_path / "again"))
    assert epochs is not None and read_contrast(again) == epochs
    folder = copy_of(strict, tmp_path / "run")
    RunFolder(folder).clear()
    assert read_contrast(folder) is None


def test_an_output_folder_for_no_new_prediction_is_refused(strict: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    with initialize_config_dir(str(files.CONF), version_base="1.3"):
        cfg = compose("score", [f"run={strict}", f"output_dir={tmp_path / 'y'}"])
    with pytest.raises(SystemExit):
        score_main.__wrapped__(cfg)
    assert "output_dir is for new predictions; change something" in capsys.readouterr().err
    assert not (tmp_path / "y").exists()


def test_config_of_a_run_is_data(strict: Path, tmp_path: Path) -> None:
    assert RunFolder(strict).config["fold"] == "A"
    text = (strict / "config.yaml").read_text()
    changed = {**yaml.safe_load(text), "model": {"_target_": "os.system", "name": "x", "command": "touch owned"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(changed))
    with pytest.raises(InputError, match="not allowed"):
        config.build(RunFolder(tmp_path).config["model"])
    for part, damage in (
        *((part, damage) for part in ("protocol", "data", "model", "trainer") for damage in (1, [], {}, None)),
        ("protocol", {"_target_": "stexp.data.readers.demo.read_demo", "name": "x", "root": str(tmp_path / "owned")}),
        ("seed", "0"),
        ("seed", -1),
    ):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({**yaml.safe_load(text), part: damage}))
        with pytest.raises(InputError, match=rf"config\.yaml(: | has no ){part}.*; train again") as caught:
            RunFolder(tmp_path).require()
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no run folder"):
        RunFolder(tmp_path / "nowhere").require()


@pytest.mark.slow
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
    with pytest.raises(InputError, match="protocol of these predictions takes no key '_target_'"):
        score_run(folder)
    assert not (tmp_path / "owned").exists()
    with pytest.raises(InputError, match="not allowed"):
        config.build(
            {"_target_": "pytorch_lightning.cli.instantiate_class", "args": [], "init": {"class_path": "os.system"}}
        )


def test_what_is_retrieved_again_does_not_say_that_it_was_corrected(strict: Path, tmp_path: Path) -> None:
    folder = copy_of(strict, tmp_path / "run")
    text = (folder / "config.yaml").read_text()
    assert "correct: false" in text and "weighting: inverse_square" in text
    (folder / "config.yaml").write_text(text.replace("correct: false", "correct: true"))
    adata = ad.read_h5ad(folder / "predictions.h5ad")
    k = json.loads(adata.uns["stexp"]["chosen"])["k"]
    adata.uns["stexp"]["chosen"] = json.dumps({"k": k, "correction_epochs": 3})
    adata.write_h5ad(folder / "predictions.h5ad")
    again = predict_again(folder, {}, ["TUMOUR02", "FAT01"], None)
    model = yaml.safe_load((again / "config.yaml").read_text())["model"]
    assert model["correct"] is False and model["weighting"] == "similarity"
    chosen = json.loads(ad.read_h5ad(again / "predictions.h5ad").uns["stexp"]["chosen"])
    assert chosen["k"] == k and "correction_epochs" not in chosen
