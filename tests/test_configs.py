"""Every choice of conf/ composes with every other, and those that do not go together say why."""

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
from omegaconf import OmegaConf
from sections import make_section

from stexp import hardware
from stexp.config import CONF, build, to_plain
from stexp.config.compose import compose
from stexp.construct import get_object
from stexp.data.splits import assign_roles, folds
from stexp.errors import InputError
from stexp.sweeps import jobs as sweeps
from stexp.training import distributed

NAMES = {
    group: [path.stem for path in sorted((CONF / group).glob("*.yaml")) if path.stem != "default"]
    for group in ("data", "model", "protocol", "trainer", "logger", "image_encoder")
}

SIZES = {
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


@functools.cache
def built(model: str) -> torch.nn.Module:
    """The method of a resolved config, without memory for its weights."""
    with torch.device("meta"):
        return build(json.loads(model), n_genes=40, n_positions=64, n_features=32)


def assert_builds(data: str, model: str, protocol: str, trainer: str) -> None:
    """What such a run is made of comes out of its config."""
    choices = [f"data={data}", f"model={model}", f"protocol={protocol}", f"trainer={trainer}"]
    plain = to_plain(compose("train", [*choices, "image_encoder.pretrained=false"]))
    assert (plain["data"]["name"], plain["protocol"]["name"], plain["model"].pop("name")) == (data, protocol, model)
    if "image_encoder" in plain["model"]:
        assert plain["model"]["image_encoder"] == plain["image_encoder"]
    method = built(json.dumps(plain["model"]))
    assert isinstance(method, pl.LightningModule) and len(method.state_dict()) > 0
    assert build(plain["protocol"]).name == protocol
    assert distributed.devices_of({**plain["trainer"], "devices": 1}, "cpu") == [0]
    assert isinstance(build({**plain["trainer"], "accelerator": "cpu", "devices": 1}, logger=False), pl.Trainer)
    assert inspect.signature(get_object(plain["data"]["reader"]["_target_"])).parameters


@pytest.mark.parametrize("model", NAMES["model"])
def test_every_model_builds_with_every_data_protocol_and_trainer(model):
    """Each two choices together; :func:`test_all_combinations_build` takes all four at once."""
    shift = NAMES["model"].index(model)
    for i, data in enumerate(NAMES["data"]):
        choices = (NAMES[group][(i + shift) % len(NAMES[group])] for group in ("protocol", "trainer"))
        assert_builds(data, model, *choices)


@pytest.mark.slow
@pytest.mark.parametrize("model", NAMES["model"])
@pytest.mark.parametrize("trainer", NAMES["trainer"])
def test_all_combinations_build(model, trainer):
    for data, protocol in itertools.product(NAMES["data"], NAMES["protocol"]):
        assert_builds(data, model, protocol, trainer)


@pytest.mark.parametrize("model", NAMES["model"])
def test_methods_that_need_one_device_refuse_several(model, data):
    plain = to_plain(compose("train", ["data=demo", f"model={model}", "image_encoder.pretrained=false"]))
    method = built(json.dumps({key: value for key, value in plain["model"].items() if key != "name"}))
    if model in ("mclstexp", "bleep"):
        return distributed.check(method, data, 2)
    with pytest.raises(InputError, match=r" trains on one device; take trainer\.devices=1"):
        distributed.check(method, data, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_trainer_for_gpus_says_that_there_is_none():
    with pytest.raises(InputError, match=r"trainer\.accelerator=gpu: torch sees no GPU here; take cpu or auto"):
        hardware.accelerator_of(to_plain(compose("train", ["data=demo", "trainer=gpu"]))["trainer"]["accelerator"])


@pytest.mark.parametrize("protocol", ["strict", "paper"])
def test_whole_sections_cannot_be_held_out_of_one(protocol, tmp_path):
    only = [make_section(tmp_path)]
    protocol = build(to_plain(compose("train", ["data=visium", f"protocol={protocol}"]))["protocol"])
    with pytest.raises(InputError, match="no section with an image is left to train on; protocol=blocks holds out"):
        assign_roles(only, protocol, folds(only, protocol)[0])


@pytest.mark.parametrize("model", NAMES["model"])
def test_a_methods_own_image_encoder_gives_way_to_one_that_is_asked_for(model):
    assert compose("train", ["image_encoder=resnet18", f"model={model}"]).image_encoder.name == "resnet18"


@pytest.mark.parametrize("group", NAMES)
def test_a_choice_that_is_not_there_is_said_with_those_that_are(group):
    with pytest.raises(InputError) as caught:
        compose("train", [f"{group}={NAMES[group][0]}x"])
    assert str(caught.value).startswith(f"{group}={NAMES[group][0]}x: choose ")
    assert f"did you mean {NAMES[group][0]}?" in str(caught.value)
    assert all(name in str(caught.value) for name in NAMES[group]) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (".x=1", "there is no key image_encoder.model_args.x; +image_encoder.model_args.x=VALUE adds it"),
        ("={x:1}", "image_encoder.model_args holds keys of its own; image_encoder.model_args.NAME=VALUE changes one"),
    ],
)
def test_keys_that_may_be_added_are_said_to_be(given, says):
    with pytest.raises(InputError) as caught:
        compose("train", ["image_encoder=timm", f"image_encoder.model_args{given}"])
    assert str(caught.value).startswith(says)
    added = compose("train", ["image_encoder=timm", "+image_encoder.model_args.x=1"])
    assert added.image_encoder.model_args == {"x": 1}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("overwrite=no", "overwrite=no: true or false would fit"),
        ("image_encoder.pretrained=null", "image_encoder.pretrained=null: true or false would fit"),
        ("model.k=true", "model.k=True: it is no switch; by itself it is k=auto"),
        ("seed=true", "seed=True: it is no switch; by itself it is seed=0"),
        ("output_dir=", "output_dir=: a name would fit"),
        ("hydra.verbose=true", "hydra.verbose=true: Hydra's own settings are for sweeps; give -m, or leave it out"),
        ("hydra/launcher=slurm", "hydra/launcher=slurm: Hydra's own settings are for sweeps"),
    ],
)
def test_values_of_another_kind_are_refused(given, says):
    with pytest.raises(InputError) as caught:
        compose("train", [given])
    assert str(caught.value).startswith(says)


def test_what_must_be_given_cannot_be_nothing():
    for name in ("score", "export", "predict"):
        with pytest.raises(InputError, match="run=null: a name would fit"):
            compose(name, ["run=null"])
    assert compose("score", ["run=x"]).run == "x"


@pytest.mark.parametrize("part", ["seed", "data", "protocol", "model", "trainer", "hardware", "image_encoder"])
def test_a_misspelt_key_is_refused_with_the_one_meant(part):
    plain = to_plain(compose("train", ["data=her2st"]))
    keys = [part] if part == "seed" else [f"{part}.{key}" for key in plain[part]]
    key = keys[len(keys) // 2]
    with pytest.raises(InputError) as caught:
        compose("train", ["data=her2st", f"{key}q=1"])
    assert str(caught.value) == f"there is no key {key}q; did you mean {key}?"


@pytest.mark.parametrize("protocol", ["paper", "strict"])
@pytest.mark.parametrize("name", SIZES)
def test_every_sweep_has_the_stated_number_of_jobs(name, protocol):
    assert set(SIZES) == set(sweeps.names())
    assert len(sweeps.jobs(name, [f"protocol={protocol}"])) == SIZES[name][protocol == "strict"]


@pytest.mark.parametrize("name", sweeps.names())
def test_the_keys_of_a_sweep_are_those_that_are_read(name):
    plan = OmegaConf.to_container(OmegaConf.load(CONF / "sweep" / f"{name}.yaml"))
    assert set(plan) <= {"of", "data", "protocol", "model", "grid", "rescore", "where", "test", "choose_by"}
    whole = sweeps.read_plan(name)
    assert {"data", "protocol", "model"} <= set(whole) and "of" not in whole
    for condition in whole.get("where", {}):
        for part in condition.split():
            axis, value = part.split("=")
            assert value in NAMES[axis]


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_every_yaml_says_what_it_is_and_names_nothing_of_one_machine(path: Path):
    text = path.read_text()
    assert not re.search(r"[\s=:'\"]/(home|root|Users|tmp|var)/", text), "a folder of somebody's machine"
    if path.parent.name in ("sweep", "launcher"):
        assert text.startswith("# ")
