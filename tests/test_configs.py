"""Every yaml of conf/: each composes and builds, with every other."""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from sections import make_section

from stexp.config import build, to_plain
from stexp.config.compose import compose
from stexp.construct import get_object
from stexp.data.datamodule import SpotDataModule
from stexp.data.dataset import BEFORE_THE_MODULE
from stexp.data.splits import assign_roles, folds
from stexp.errors import InputError
from stexp.files import CONF
from stexp.hardware import ACCELERATORS
from stexp.models.mclstexp import MclSTExp
from stexp.models.method import Method
from stexp.protocol import Protocol, named_protocols, other_protocols
from stexp.sweeps.jobs import jobs
from stexp.sweeps.plan import read_plan, sweep_names

NAMES = {
    group: [path.stem for path in sorted((CONF / group).glob("*.yaml")) if path.stem != "default"]
    for group in ("data", "model", "protocol", "trainer", "logger", "image_encoder")
}
SIZES_OF_DATA = {"n_genes": 40, "n_positions": 64, "n_features": 32}
JOBS = {
    "table1": (6 * (32 + 12 + 9), 6 * (8 + 4 + 8)),
    "tableS2": (32, 8),
    "tableS3": (12, 4),
    "tableS4": (4 * 53, 4 * 20),
    "tableS5": (3 * 53, 3 * 20),
    "tableS6": (3 * 53, 3 * 20),
    "tableS7": (3 * 53, 3 * 20),
    "figS1": (32 + 12, 8 + 4),
    "figS2": (53, 20),
    "figS3": (6 * 6, 6 * 6),
    "figS4": (7 * 32 + 7 * 12 + 6 * 9, 7 * 8 + 7 * 4 + 6 * 8),
    "search": (27 * 32, 27 * 8),
}
"""Cells of every sweep under the paper's protocol (folds 32, 12, 9) and under strict (patients 8, 4, 8)."""


def method_of(model: dict) -> Method:
    """The method of a resolved config, without memory for its weights."""
    with torch.device("meta"):
        return build({key: value for key, value in model.items() if key != "name"}, **SIZES_OF_DATA)


# every choice with every other


@pytest.mark.slow
def test_every_data_set_model_protocol_and_trainer_go_together():
    """Compositions that have every choice at least once, with those of other groups in turn; then all put in."""
    tiny = to_plain(compose("train", ["image_encoder=tiny"]).image_encoder)
    groups = ("data", "protocol", "trainer")
    parts = {group: {name: compose("train", [f"{group}={name}"])[group] for name in NAMES[group]} for group in groups}
    built = functools.cache(lambda model: method_of(json.loads(model)))
    for data in parts["data"].values():
        assert_data_is_taken(to_plain(data))
    for i in range(max(len(NAMES[group]) for group in (*groups, "model"))):
        model = NAMES["model"][i % len(NAMES["model"])]
        own = {group: NAMES[group][i % len(NAMES[group])] for group in groups}
        cfg = compose("train", [f"model={model}", *(f"{group}={name}" for group, name in own.items())])
        assert (cfg.data.name, cfg.model.name) == (own["data"], model)
        assert all(cfg[group] == parts[group][own[group]] for group in ("protocol", "trainer"))
        trainers = itertools.cycle(NAMES["trainer"])
        for data, protocol in itertools.product(NAMES["data"], NAMES["protocol"]):
            for group, name in zip(groups, (data, protocol, next(trainers)), strict=True):
                cfg[group] = parts[group][name]
            node = to_plain(cfg.model)
            if "image_encoder" in node:
                assert node["image_encoder"] == cfg.image_encoder
                node["image_encoder"] = tiny  # those of each model and every encoder are built below
            method = built(json.dumps(node))
            assert isinstance(method, Method)
            for key in {"spot_context", "k"} & set(node):
                if "${" in str(OmegaConf.to_container(cfg.model)[key]):  # left to the protocol
                    assert getattr(method, key) == cfg.protocol[key]
            if "${data.n_neighbours}" in str(OmegaConf.to_container(cfg.model)):
                assert node["n_neighbours"] == cfg.data.n_neighbours


def assert_data_is_taken(data: dict) -> None:
    """Every key of a data set is one of its reader, of the data module, or of what comes before that."""
    reader = data["reader"]
    assert set(reader) - {"_target_"} <= set(inspect.signature(get_object(reader["_target_"])).parameters)
    of_module = set(data) - BEFORE_THE_MODULE - set(reader)
    assert of_module and of_module <= set(inspect.signature(SpotDataModule).parameters)


@pytest.mark.parametrize("model", NAMES["model"])
def test_every_model_builds_with_its_own_image_encoder(model):
    cfg = compose("train", ["data=her2st", f"model={model}", "image_encoder.pretrained=false"])
    method = method_of(to_plain(cfg.model))
    # every argument of the method stands in its yaml, so that config.yaml of a run names them all
    assert set(inspect.signature(type(method)).parameters) - set(SIZES_OF_DATA) == set(cfg.model) - {"_target_", "name"}


@pytest.mark.parametrize("encoder", NAMES["image_encoder"])
def test_every_image_encoder_builds_a_model_that_embeds(encoder):
    named = ["image_encoder.name=test_resnet"] if encoder == "timm" else []
    cfg = compose("train", [f"image_encoder={encoder}", *named, "image_encoder.pretrained=false"])
    assert to_plain(cfg.model)["image_encoder"] == to_plain(cfg.image_encoder)
    with torch.device("meta"):  # shapes without memory: the largest have 1.1 billion parameters
        method = method_of(to_plain(cfg.model)).eval()
        assert type(method) is MclSTExp
        assert method.embed_image(torch.rand(1, 3, 224, 224)).shape == (1, 256)


def test_the_demo_and_some_models_choose_an_image_encoder_unless_one_is_asked_for():
    assert compose("train", ["data=demo"]).image_encoder.name == "test_resnet"
    assert compose("train", ["data=her2st"]).image_encoder.name == "densenet121"
    assert compose("train", ["data=her2st", "model=bleep"]).image_encoder.name == "resnet50"
    for model in NAMES["model"]:
        cfg = compose("train", ["data=demo", "image_encoder=resnet18", f"model={model}"])
        assert cfg.image_encoder.name == "resnet18"


def test_every_trainer_builds(tmp_path):
    for name in NAMES["trainer"]:
        node = to_plain(compose("train", [f"trainer={name}", "trainer.max_epochs=3"]).trainer)
        node |= {"accelerator": "cpu", "devices": 1, "strategy": "auto"}
        trainer = build(node, logger=False, default_root_dir=str(tmp_path))
        assert isinstance(trainer, pl.Trainer) and (trainer.max_epochs, trainer.num_devices) == (3, 1)


def test_every_kind_of_device_can_be_chosen():
    chosen = {compose("train", [f"trainer={name}"]).trainer.accelerator for name in NAMES["trainer"]}
    assert chosen | {"cuda"} == set(ACCELERATORS), "gpu is cuda where there is one"
    for command in ("predict", "evaluate"):
        (line,) = [line for line in (CONF / f"{command}.yaml").read_text().splitlines() if line.startswith("device:")]
        assert line.endswith(", ".join(ACCELERATORS)), command


@pytest.mark.parametrize("name", NAMES["logger"])
def test_every_logger_builds_inside_the_run_folder(tmp_path, name):
    if name != "csv":
        pytest.importorskip(name)
    logger = build(compose("train", [f"logger={name}", f"output_dir={tmp_path}/run"]).logger)
    assert str(logger.save_dir).startswith(str(tmp_path))
    if name == "wandb":
        assert logger.mode == "auto"  # offline without a key


def test_callbacks_build_and_write_into_the_run_folder(tmp_path):
    callbacks = build(compose("train", ["seed=5", f"output_dir={tmp_path}/run"]).callbacks)
    assert callbacks["reseed"].seed == 5
    assert Path(callbacks["last"].dirpath) == tmp_path / "run" / "checkpoints"


# protocols


def test_protocols_by_name_are_complete():
    protocols = named_protocols()
    assert set(protocols) == {"blocks", "paper", "strict"}
    for name in protocols:
        node = OmegaConf.load(CONF / "protocol" / f"{name}.yaml")
        assert set(node) - {"_target_"} == set(inspect.signature(Protocol).parameters)
    assert protocols["strict"] == Protocol("strict")  # the defaults of the class are the strict ones
    assert protocols["blocks"] == Protocol("blocks", hold_out="block")


def test_a_run_is_scored_under_other_truths_not_other_splits():
    protocols = named_protocols()
    assert list(other_protocols(protocols["strict"])) == list(other_protocols(protocols["blocks"])) == ["paper"]
    assert list(other_protocols(protocols["paper"])) == ["strict"]


def test_whole_sections_cannot_be_held_out_of_one(tmp_path):
    only = [make_section(tmp_path)]
    for name in ("strict", "paper"):
        protocol = named_protocols()[name]
        with pytest.raises(InputError, match=r"no section .* left to train.*protocol=blocks"):
            assign_roles(only, protocol, folds(only, protocol)[0])


# sweeps


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_every_sweep_has_the_stated_number_of_jobs(name):
    for protocol, n in zip(("paper", "strict"), JOBS[name], strict=True):
        assert len(jobs(name, [f"protocol={protocol}"])) == n


def test_the_keys_of_every_sweep_are_those_that_are_read():
    assert set(JOBS) == set(sweep_names())
    for name in sweep_names():
        plan = OmegaConf.load(CONF / "sweep" / f"{name}.yaml")
        assert isinstance(plan, DictConfig)
        assert set(plan) <= {"of", "data", "protocol", "model", "grid", "rescore", "where", "test", "choose_by"}
        whole = read_plan(name)
        assert {"data", "protocol", "model"} <= set(whole) and "of" not in whole
        for axis, value in (part.split("=") for condition in whole.get("where", {}) for part in condition.split()):
            assert value in NAMES[axis]


def test_no_yaml_names_a_folder_of_one_machine():
    for path in CONF.rglob("*.yaml"):
        text = path.read_text()
        assert not re.search(r"[\s=:'\"]/(home|root|Users|tmp|var)/", text), path
        assert path.parent.name not in ("sweep", "launcher") or text.startswith("# "), path
