"""Configs: what they may call, what they say when a key is wrong, and that every one of them composes and builds."""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from sections import make_section

from stexp import config
from stexp.config import CONF, build, load_run, misread, to_plain
from stexp.data.datamodule import SpotDataModule
from stexp.errors import InputError
from stexp.models.mclstexp import MclSTExp
from stexp.protocol import Protocol

NAMES = {
    group: [path.stem for path in sorted((CONF / group).glob("*.yaml"))]
    for group in ("data", "model", "protocol", "image_encoder", "trainer", "logger", "callbacks")
}
NAMES["data"].remove("default")


def train_config(tmp_path: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", ["fold=A", f"output_dir={tmp_path}/run", f"data.root={tmp_path}/data", *overrides])


def build_model(cfg: DictConfig) -> MclSTExp:
    return build(
        {key: value for key, value in to_plain(cfg.model).items() if key != "name"},
        n_genes=8,
        n_positions=4,
        n_features=6,
    )


def encoder_overrides(name: str) -> list[str]:
    return [f"image_encoder={name}", *(["image_encoder.name=test_resnet"] if name == "timm" else [])]


# what a config may call


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.exec",
        "torch.load",
        "subprocess.run",
        "hydra.utils.instantiate",
        "stexp.hardware.os.system",
        "stexp.cli.train.shutil.rmtree",
        "stexp.config.OmegaConf.load",
        "stexp.config.CONF.joinpath",
        "stexp.config.ALLOWED.count",
        "stexp.config.build.__call__",
        "pytorch_lightning.loggers.csv_logs.os.system",
        "pytorch_lightning.trainer.trainer.torch.load",
        "stexpevil.run",
        "stexp",
        "stexp.config.CONF",
        "stexp.config.build.__globals__",
        "",
        3,
        None,
    ],
)
def test_foreign_targets_are_refused_before_they_run(target, tmp_path):
    for node in ({"_target_": target, "_args_": [f"touch {tmp_path}/ran"]}, {"inner": [{"_target_": target}]}):
        with pytest.raises(InputError, match=r"_target_ .* is not allowed; a config may name classes of stexp"):
            build(node)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "target",
    [
        "stexp.protocol.Protocoll",
        "stexp.nothing.here",
        "pytorch_lightning.Trainerr",
        "stexp.",
        "stexp..x",
    ],
)
def test_targets_that_do_not_exist_are_refused_in_one_line(target):
    with pytest.raises(InputError, match=r"_target_ .* cannot be found: ") as caught:
        build({"_target_": target})
    assert "\n" not in str(caught.value)


def test_a_misspelt_key_gets_the_nearest_one():
    protocol = {"_target_": "stexp.protocol.Protocol", "name": "x"}
    with pytest.raises(InputError, match=r"stexp.protocol.Protocol takes no key 'holdout'; did you mean 'hold_out'\?"):
        build(protocol | {"holdout": "section"})
    with pytest.raises(InputError, match=r"takes no key 'zzz'$"):
        build(protocol | {"zzz": 1})
    with pytest.raises(InputError, match="takes no key '_partial_'"):
        build(protocol | {"_partial_": True})


def test_a_package_that_is_not_installed_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr("lightning_fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", False)
    with pytest.raises(InputError, match=r"TensorBoardLogger: Neither `tensorboard` nor `tensorboardX` is available"):
        build(train_config(tmp_path, "logger=tensorboard").logger)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("protocol.target_sum=0", "protocol.target_sum=0: a number above 0 (say 10000) would fit"),
        ("protocol.target_sum=nan", "protocol.target_sum=nan: a number above 0 (say 10000) would fit"),
        ("protocol.panel_size=0", "protocol.panel_size=0: a whole number of at least 1 would fit"),
        ("protocol.n_hvg=-5", "protocol.n_hvg=-5: a whole number of at least 1 would fit"),
        ("protocol.n_hvg=null", "protocol.n_hvg=None: a whole number of at least 1 would fit"),
        ("protocol.min_spots=1.5", "protocol.min_spots=1.5: a fraction of the spots, 0 to 1, would fit"),
        ("protocol.min_spots=half", "protocol.min_spots=half: a fraction of the spots, 0 to 1, would fit"),
        ("protocol.name='a:b'", "protocol.name=a:b: a name without slashes and colons would fit"),
    ],
)
def test_a_protocols_numbers_are_checked(tmp_path, override, message):
    with pytest.raises(InputError) as caught:
        build(train_config(tmp_path, override).protocol)
    assert str(caught.value) == message


def test_containers_come_as_plain_dict_and_list_and_inner_nodes_are_built_first():
    node = OmegaConf.create(
        {
            "size": 0.2,
            "list": [1, {"a": "${size}"}],
            "protocol": {"_target_": "stexp.protocol.Protocol", "name": "x", "min_spots": "${size}"},
        }
    )
    made = build(node)
    assert type(made) is dict and type(made["list"]) is list and type(made["list"][1]) is dict
    assert made["list"] == [1, {"a": 0.2}] and made["protocol"] == Protocol("x", min_spots=0.2)
    again = build({"_target_": "stexp.protocol.Protocol", "name": "y"}, target_sum=5.0)
    assert again == Protocol("y", target_sum=5.0)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"a": "???"}, "config: .*a"),
        ({"a": "${b}"}, "config: .*b"),
        ({"a": "${oc.env:STEXP_NO_SUCH_VARIABLE}"}, "config: .*STEXP_NO_SUCH_VARIABLE"),
    ],
)
def test_what_is_missing_in_a_config_is_said_in_one_line(node, message):
    with pytest.raises(InputError, match=message) as caught:
        to_plain(OmegaConf.create(node))
    assert "\n" not in str(caught.value)


# run folders are data


def test_a_runs_config_is_read_and_nothing_in_it_is_executed(tmp_path):
    (tmp_path / "config.yaml").write_text(f"model:\n  _target_: os.system\n  command: touch {tmp_path}/ran\nseed: 3\n")
    cfg = load_run(tmp_path)
    assert (cfg.seed, cfg.model._target_) == (3, "os.system")
    with pytest.raises(InputError, match=r"os\.system is not allowed"):
        build(cfg.model)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['touch {ran}']\n",
        "a: !!python/name:os.system\n",
        "a: [1, 2\n",
        "3\n",
        "",
        "- 1\n- 2\n",
    ],
)
def test_a_runs_config_that_is_no_plain_yaml_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text.format(ran=tmp_path / "ran"))
    with pytest.raises(InputError, match=r"config\.yaml cannot be read") as caught:
        load_run(tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"\x89HDF\r\n\x1a\n\x00\xff", b"\xff\xfe\x00a"])
def test_a_runs_config_that_is_no_text_is_refused(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.yaml cannot be read: .*; train again with overwrite=true") as caught:
        load_run(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_key_that_was_cut_from_a_runs_config_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)  # its handler would outlive the captured stream
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    with pytest.raises(SystemExit) as caught, config.command():
        load_run(tmp_path).model.k  # noqa: B018
    assert caught.value.code == 2
    assert capsys.readouterr().err == "stexp: error: config: Missing key model\n"


# what a command line reads as something else


@pytest.mark.parametrize(("name", "read_as"), [("10_1", "101"), ("1_000", "1000"), ("1e3", "1000.0"), ("1.10", "1.1")])
def test_a_name_that_hydra_reads_as_a_number_is_hinted_at(tmp_path, name, read_as):
    value = train_config(tmp_path, f"fold={name}").fold
    assert str(value) == read_as
    hint = misread(str(value), ["A", "9_1", "with space", "[x", name], "fold={}")
    assert hint == f"; without quotes {name} is read as {read_as}, so give \"fold='{name}'\""
    assert train_config(tmp_path, f"fold='{name}'").fold == name


@pytest.mark.parametrize("given", ["101", "B", "None"])
def test_a_name_that_is_just_wrong_gets_no_hint(given):
    assert misread(given, ["A", "A1", "007", "x10_1"], "fold={}") == ""


def test_a_folder_without_a_config_is_no_run(tmp_path):
    with pytest.raises(InputError, match=r"is no run folder: it has no config.yaml"):
        load_run(tmp_path)


# every yaml


@pytest.mark.parametrize(
    ("data", "protocol", "encoder"), itertools.product(NAMES["data"], NAMES["protocol"], ("densenet121", "virchow2"))
)
def test_every_combination_composes(tmp_path, data, protocol, encoder):
    cfg = train_config(tmp_path, f"data={data}", f"protocol={protocol}", *encoder_overrides(encoder))
    plain = to_plain(cfg)
    assert (plain["data"]["name"], plain["protocol"]["name"]) == (data, protocol)
    assert plain["model"]["image_encoder"] == plain["image_encoder"]
    for key in ("k", "spot_context"):
        assert plain["model"][key] == plain["protocol"][key]
    assert plain["model"]["n_neighbours"] == plain["data"]["n_neighbours"]
    reader = plain["data"]["reader"]
    taken = set(plain["data"]) - config._OF_THE_FRAME - set(reader)
    assert taken <= set(inspect.signature(SpotDataModule).parameters)
    known = inspect.signature(config.get_object(reader["_target_"])).parameters
    assert {key for key in reader if key != "_target_"} <= set(known)


def test_the_demo_takes_the_tiny_encoder_and_others_the_papers(tmp_path):
    assert train_config(tmp_path, "data=demo").image_encoder.name == "test_resnet"
    assert train_config(tmp_path, "data=her2st").image_encoder.name == "densenet121"
    assert train_config(tmp_path, "data=demo", "image_encoder=resnet18").image_encoder.name == "resnet18"


@pytest.mark.parametrize("encoder", NAMES["image_encoder"])
def test_every_image_encoder_builds_a_model_that_embeds(tmp_path, encoder):
    cfg = train_config(tmp_path, *encoder_overrides(encoder), "image_encoder.pretrained=false")
    assert to_plain(cfg.model)["image_encoder"] == to_plain(cfg.image_encoder)
    with torch.device("meta"):  # shapes without memory: the largest have 1.1 billion parameters
        model = build_model(cfg).eval()
        assert type(model) is MclSTExp
        assert model.embed_image(torch.rand(1, 3, 224, 224)).shape == (1, 256)


@pytest.mark.parametrize("model", NAMES["model"])
@pytest.mark.parametrize("protocol", NAMES["protocol"])
def test_every_model_builds_under_every_protocol(tmp_path, model, protocol):
    cfg = train_config(tmp_path, f"model={model}", f"protocol={protocol}", "image_encoder=tiny")
    made = build_model(cfg)
    for key in {"spot_context", "k"} & set(cfg.model):
        if "${" in str(OmegaConf.to_container(cfg.model)[key]):  # left to the protocol
            assert getattr(made, key) == cfg.protocol[key]
    # every argument of the method stands in its yaml, so that config.yaml of a run names them all
    arguments = set(inspect.signature(type(made)).parameters) - {"n_genes", "n_positions", "n_features"}
    assert arguments == set(cfg.model) - {"_target_", "name"}


def test_protocols_by_name_are_complete():
    assert set(config.protocols()) == set(NAMES["protocol"]) == {"blocks", "paper", "strict"}
    for name, node in config.protocols().items():
        assert set(node) - {"_target_"} == set(inspect.signature(Protocol).parameters)
        assert build(node).name == name
    strict = build(config.protocols()["strict"])
    assert strict == Protocol("strict")  # the defaults of the class are the strict ones
    assert build(config.protocols()["blocks"]) == replace(strict, name="blocks", hold_out="block")


def test_a_run_is_scored_under_other_truths_not_other_splits():
    blocks, paper, strict = (config.build(node) for _, node in sorted(config.protocols().items()))
    assert list(config.other_protocols(strict)) == list(config.other_protocols(blocks)) == ["paper"]
    assert list(config.other_protocols(paper)) == ["strict"]


@pytest.mark.parametrize("name", NAMES["trainer"])
def test_every_trainer_builds(tmp_path, name):
    node = train_config(tmp_path, f"trainer={name}", "trainer.max_epochs=3").trainer
    if node.accelerator == "gpu" and not torch.cuda.is_available():
        node.accelerator = "cpu"
    trainer = build(node, logger=False, default_root_dir=str(tmp_path))
    assert trainer.max_epochs == 3 and trainer.num_devices == 1


@pytest.mark.parametrize("name", NAMES["logger"])
def test_every_logger_builds_inside_the_run_folder(tmp_path, name):
    if name == "wandb":
        pytest.importorskip("wandb")
    logger = build(train_config(tmp_path, f"logger={name}").logger)
    assert str(logger.save_dir).startswith(str(tmp_path))
    if name == "wandb":
        assert logger.mode == "auto"  # offline without a key


@pytest.mark.parametrize("name", NAMES["callbacks"])
def test_callbacks_build_and_write_into_the_run_folder(tmp_path, name):
    made = build(train_config(tmp_path, f"callbacks={name}", "seed=5").callbacks)
    assert made["reseed"].seed == 5
    assert Path(made["last"].dirpath) == tmp_path / "run" / "checkpoints"


def test_lambda_of_the_papers_table_is_reachable(tmp_path):
    cfg = train_config(tmp_path, "model.image_weight=1", "model.temperature=0.1", "image_encoder=tiny")
    made = build_model(cfg)
    assert made.image_weight == 1 and float(made.log_temperature.detach()) == pytest.approx(math.log(0.1))


def test_a_section_listed_under_two_names_is_refused(tmp_path):
    sections = [make_section(tmp_path, "A1", "A"), make_section(tmp_path, "B1", "B", seed=1)]
    config._refuse_copies(sections)
    with pytest.raises(InputError, match="sections A1 and C1 hold the same counts; list them once"):
        config._refuse_copies([*sections, replace(sections[0], name="C1", patient="C")])
