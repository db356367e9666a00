"""Every logger gets the same numbers; W&B gets tables, maps and files, and never stands in the way of a run."""

from __future__ import annotations

import json
import logging
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import demo_run
import numpy as np
import pandas as pd
import pytest
import wandb
from pytorch_lightning.loggers import TensorBoardLogger

from stexp import config
from stexp.errors import InputError
from stexp.evaluation.records import read_json
from stexp.evaluation.verdict import best_floor
from stexp.runs.folder import RunFolder
from stexp.training import loggers as logs


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B without key, account and home."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb" / name))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def records(path: Path) -> Iterator:
    """The records of a ``.wandb`` file: a log in the format of LevelDB that holds protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()
    assert content[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no header is split between blocks
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def history(found: list) -> list[dict]:
    rows = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def a_logger(tmp_path: Path, **given) -> logs.WandbRun:
    return logs.WandbRun(str(tmp_path / "logs"), "stexp", "demo/A/s0", **given)


def test_curves_health_and_scores_are_in_the_csv(strict: Path) -> None:
    metrics = read_json(strict / "metrics.json")
    rows = pd.read_csv(strict / "logs" / "csv" / "version_0" / "metrics.csv")
    steps = rows["train/loss"].notna().sum()
    assert rows["health/grad_norm"].notna().sum() == steps and (rows["health/grad_norm"].dropna() > 0).all()
    assert rows["health/spots_per_second"].notna().sum() == rows["val/pearson"].notna().sum() == 4
    assert "health/gpu_memory_gb" not in rows, "no GPU"
    last = rows[rows["test/pearson_acg"].notna()]
    assert len(last) == 1 and last["test/pearson_acg"].item() == pytest.approx(metrics["scores"]["pearson_acg"])
    floor = rows[["step", "floor/colour_ridge/pearson_acg"]].dropna()
    assert floor["step"].tolist() == [0, last["step"].item()] and steps == last["step"].item()
    assert floor.iloc[:, 1].to_numpy() == pytest.approx(metrics["floors"]["colour_ridge"]["pearson_acg"])


def test_the_gradient_norm_is_that_of_all_gradients() -> None:
    import torch

    from stexp.training.callbacks import Health

    class Model(torch.nn.Linear):
        def log(self, name, value):
            self.logged = {name: float(value)}

    class Trainer:
        global_step, log_every_n_steps = 4, 2

    model = Model(3, 2)
    model(torch.randn(5, 3)).square().sum().backward()
    Health().on_before_optimizer_step(Trainer, model, None)
    expected = np.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in model.parameters()))
    assert model.logged == {"health/grad_norm": pytest.approx(expected, rel=1e-5)}


def test_tensorboard_has_the_same_numbers(strict: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = read_json(strict / "metrics.json")
    logger = TensorBoardLogger(tmp_path, "tensorboard", "")
    logger.log_metrics({"train/loss": 3.0}, step=7)
    logger.finalize("success")  # as Lightning does after the fit
    logs.begin(logger, {"seed": 0})
    logs.results(logger, strict, metrics, 12)
    logs.end(logger, "success")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    expected = logs.reference_scalars(metrics) | logs.test_scalars(metrics)
    assert set(events.Tags()["scalars"]) == {*expected, "train/loss"}
    for name, value in expected.items():
        seen = events.Scalars(name)
        assert [event.step for event in seen] == ([12] if name.startswith("test/") else [0, 12])
        assert all(event.value == pytest.approx(value, rel=1e-5) for event in seen)


def test_scores_that_are_none_are_left_out() -> None:
    scores = {"pearson_acg": 0.3, "mse": None}
    floors = {"mean": {"pearson_acg": 0.0, "mse": 2.0, "r2": 1.0}, "depth_oracle": {"pearson_acg": 0.9, "mse": None}}
    metrics = {"scores": scores, "floors": floors, "ceiling": {"pearson_acg": 0.7}}
    assert logs.test_scalars(metrics) == {"test/pearson_acg": 0.3, "test/above_best_floor": 0.3}, "oracles aside"
    assert logs.reference_scalars(metrics) == {
        "floor/mean/pearson_acg": 0.0,
        "floor/mean/mse": 2.0,
        "floor/depth_oracle/pearson_acg": 0.9,
        "ceiling/pearson_acg": 0.7,
    }


@pytest.mark.slow
def test_an_offline_wandb_run_holds_everything(strict: Path, tmp_path: Path) -> None:
    metrics, panel = read_json(strict / "metrics.json"), ad.read_h5ad(strict / "predictions.h5ad", backed="r").n_vars
    logger = a_logger(tmp_path, group="table1", job_type="mclstexp", tags=["strict"], maps=2, checkpoint=True)
    try:
        logs.begin(logger, RunFolder(strict).config)
        logger.log_metrics({"train/loss": 2.5, "health/grad_norm": 0.5}, step=3)
        logs.results(logger, strict, metrics, 12)
        assert wandb.run.settings.mode == "offline" and wandb.run.settings.finish_timeout == 300
    finally:
        logs.end(logger, "success")
    assert wandb.run is None
    wandb.teardown()  # W&B's own process writes the rest, as at the end of a command
    folder = next((tmp_path / "logs" / "wandb").glob("offline-run-*"))
    found = list(records(next(folder.glob("*.wandb"))))

    run = next(record.run for record in found if record.WhichOneof("record_type") == "run")
    assert (run.run_group, run.job_type, run.display_name) == ("table1", "mclstexp", "demo/A/s0")
    assert list(run.tags) == ["strict"] and run.project == "stexp"
    configs = [item for record in found for item in (*record.run.config.update, *record.config.update)]
    settings = {item.key: json.loads(item.value_json) for item in configs if item.key}
    assert settings["model"]["name"] == "mclstexp" and settings["fold"] == "A"

    rows = history(found)
    assert any(row.get("train/loss") == 2.5 and row["trainer/global_step"] == 3 for row in rows)
    floor = f"floor/{best_floor(metrics)}/pearson_acg"
    curve = [(row["trainer/global_step"], row[floor]) for row in rows if floor in row]
    assert [step for step, _ in curve] == [0, 12] and curve[0][1] == curve[1][1]
    shown = next(row for row in rows if "gene_maps/filenames" in row)
    assert (shown["genes/nrows"], shown["genes/ncols"]) == pd.read_csv(strict / "per_gene.csv").shape
    assert shown["genes/nrows"] == panel
    assert shown["neighbours/ncols"] == 5 and len(shown["gene_maps/filenames"]) == 2
    assert all((folder / "files" / name).is_file() for name in shown["gene_maps/filenames"])
    artifacts = {
        record.artifact.type: {entry.path for entry in record.artifact.manifest.contents}
        for record in found
        if record.WhichOneof("record_type") == "artifact"
    }
    assert artifacts["report"] == {"report.html"} and artifacts["model"] == {"best.ckpt"}
    assert [record.exit.exit_code for record in found if record.WhichOneof("record_type") == "exit"] == [0]


def test_without_a_key_a_run_is_offline_and_asks_no_server(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr("requests.head", lambda *_, **__: pytest.fail("asked"))
    assert a_logger(tmp_path)._mode(wandb) == "offline"
    assert not caplog.records
    with pytest.raises(InputError, match=r"no key here; `wandb login`"):
        a_logger(tmp_path, mode="online")._mode(wandb)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert a_logger(tmp_path, mode="offline")._mode(wandb) == "offline"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert a_logger(tmp_path)._mode(wandb) == "offline"
    with pytest.raises(InputError, match="choose auto, online or offline"):
        a_logger(tmp_path, mode="on")


@pytest.mark.parametrize("stalls", [False, True], ids=["closed", "stalls"])
def test_a_key_without_network_is_one_warning(tmp_path: Path, monkeypatch, caplog, stalls: bool) -> None:
    monkeypatch.setattr(logs, "ANSWER_SECONDS", 0.3)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    with socket.socket() as server:  # closed, it refuses; listening, it never answers
        server.bind(("127.0.0.1", 0))
        if stalls:
            server.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        with caplog.at_level(logging.WARNING):
            assert a_logger(tmp_path)._mode(wandb) == "offline"
    assert ["W&B: offline, for http://127.0.0.1" in record.message for record in caplog.records] == [True]


def test_a_run_that_cannot_begin_online_goes_on_offline(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr("requests.head", lambda *_, **__: None)
    asked = []

    def init(**given):
        asked.append((given["mode"], given["settings"].init_timeout))
        if given["mode"] == "online":
            raise wandb.errors.CommError("the key is refused")
        return "a run"

    monkeypatch.setattr("wandb.init", init)
    assert a_logger(tmp_path)._begin() == "a run"
    assert asked == [("online", logs.START_SECONDS), ("offline", logs.START_SECONDS)]
    assert [record.message for record in caplog.records] == [
        "W&B: offline, for the run could not begin (the key is refused)"
    ]


def test_what_fails_at_the_end_is_one_warning(strict: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    logger = a_logger(tmp_path)
    monkeypatch.setattr(logger, "log_metrics", lambda *_, **__: None)
    monkeypatch.setattr(logs, "_tables_and_files", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    logs.results(logger, strict, read_json(strict / "metrics.json"), 3)
    assert [record.message for record in caplog.records] == ["W&B: tables and files are not all logged (disk full)"]
    logs.end(logger, "success")  # never begun: nothing to finish


def test_the_config_names_group_method_and_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("STEXP_SWEEP", "table1")  # as a sweep starts its jobs
    cfg = demo_run.configure(tmp_path, tmp_path / "run", "logger=wandb", "fold=B", "seed=3")
    logger = config.build(cfg.logger)
    assert logger._name == "demo/B/s3"
    assert logger.about == {"entity": None, "group": "table1", "job_type": "mclstexp", "tags": ["strict"]}


def test_another_logger_is_the_same_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()

    def claim(*overrides: str) -> bool:
        cfg = config.to_plain(demo_run.configure(tmp_path, folder, *overrides))
        return RunFolder(folder).claim(cfg, overwrite=False)

    claim("fold=B")
    (folder / "checkpoints").mkdir()
    assert claim("fold=B", "logger=wandb") is False, "it goes on"
    with pytest.raises(InputError, match="another config"):
        claim("fold=A")


def test_neighbours_are_counted_by_where_they_are_from() -> None:
    obs = pd.DataFrame(
        {
            "section": pd.Categorical(["A1", "A1", "A1", "A2"]),
            "neighbour_section": pd.Categorical(["B1", "C1", "B1", "B1"]),
            "neighbour_patient": ["B", "C", "B", "B"],
            "neighbour_section_weight": [0.5, 0.9, 0.7, 1.0],
        }
    )
    table = logs.neighbour_table(obs)
    assert table.to_numpy().tolist() == [
        ["A1", "B1", "B", 2, 0.6],
        ["A1", "C1", "C", 1, 0.9],
        ["A2", "B1", "B", 1, 1.0],
    ]


def test_a_map_shows_where_a_gene_is_high() -> None:
    x, y = (grid.ravel() * 100.0 for grid in np.meshgrid(np.arange(10), np.arange(10)))
    observed = np.stack([x < 450, x >= 450], axis=1).astype(np.float32)  # one gene left, the other right
    predictions = ad.AnnData(
        observed,
        obs=pd.DataFrame({"section": "S"}, index=[f"S:{i}" for i in range(100)]),
        var=pd.DataFrame(index=["LEFT", "RIGHT"]),
        layers={"observed": observed, "predicted": observed[:, ::-1].copy()},
        obsm={"spatial": np.stack([x, y], axis=1)},
    )
    yellow = {}
    for gene in predictions.var_names:
        picture = np.asarray(logs.gene_map(predictions, "S", gene)).astype(int)
        high = (picture[..., 0] > 200) & (picture[..., 1] > 200) & (picture[..., 2] < 90)  # the end of viridis
        columns = np.flatnonzero(high[:, : picture.shape[1] * 8 // 10].sum(axis=0) > 40)
        yellow[gene] = columns.min(), columns.max()
    # observed left and predicted right: the outer halves; the other way round: the inner ones
    assert yellow["LEFT"][0] < yellow["RIGHT"][0] and yellow["LEFT"][1] > yellow["RIGHT"][1]


def test_the_dashboard_shows_what_runs_log(strict: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("wandb_workspaces")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "experiments"))
    import wandb_dashboard

    wandb_dashboard.main(["me/stexp", "sweep=table1", "--print"])
    text = capsys.readouterr().out
    views = json.loads(text)
    assert [view["displayName"] for view in views] == [
        f"table1: {name}" for name in ("scores", "folds", "health", "maps")
    ]
    for view in views:
        (runs,) = view["spec"]["section"]["runSets"]
        assert [(f["key"]["name"], f["value"]) for f in runs["filters"]["filters"]] == [("group", "table1")]
    metrics = read_json(strict / "metrics.json")
    logged = {*logs.test_scalars(metrics), *logs.reference_scalars(metrics), "health/gpu_memory_gb"}
    logged |= set(pd.read_csv(strict / "logs" / "csv" / "version_0" / "metrics.csv"))
    named = set(re.findall(r'"(?:summary:)?((?:test|floor|ceiling|train|val|health)/[^"]*)"', text))
    assert len(named) > 10 and named <= logged
    assert {"gene_maps", "genes", "neighbours"} <= set(re.findall(r'"(\w+)"', text))

    wandb_dashboard.main(["me/stexp", "--print"])
    assert "table1" not in capsys.readouterr().out
    for wrong in ([], ["stexp"], ["me/stexp", "table1"], ["me/stexp", "sweep=a", "sweep=b"]):
        with pytest.raises(SystemExit, match="ENTITY/PROJECT"):
            wandb_dashboard.main(wrong)
