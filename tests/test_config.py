"""Config mechanism: what a config may call, what is said where a key is wrong, and run folders as data."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from stexp import config
from stexp.config import build, misread, to_plain
from stexp.config.compose import compose, parse, quoted, unquoted
from stexp.errors import InputError, UnknownName
from stexp.files import CONF
from stexp.protocol import Protocol
from stexp.runs.folder import RunFolder


def refused(name: str, *overrides: str) -> str:
    """What is said to a command line that does not fit: one line."""
    with pytest.raises(InputError) as caught:
        compose(name, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# what a command line may change


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("model.lrr", "model.lr"),
        ("model.learningrate", "model.lr"),
        ("model.learning_rate", "model.lr"),
        ("learning_rate", "model.lr"),
        ("lr", "model.lr"),
        ("epochs", "trainer.max_epochs"),
        ("model.epochs", "trainer.max_epochs"),
        ("trainer.epochs", "trainer.max_epochs"),
        ("batchsize", "data.batch_size"),
        ("data.batchsize", "data.batch_size"),
        ("gpus", "trainer.devices"),
        ("modell", "model"),
        ("model/foo", "model"),
        ("model.image_encoder.frozen", "image_encoder.frozen"),
    ],
)
def test_a_key_that_is_not_there_is_refused_with_the_one_meant(key, nearest):
    assert refused("train", f"{key}=1") == f"there is no key {key}; did you mean {nearest}?"


def test_the_nearest_key_is_offered_in_every_part_of_the_config():
    plain = to_plain(compose("train", ["data=her2st"]))
    for part in ("seed", "data", "protocol", "model", "trainer", "hardware", "image_encoder"):
        keys = [part] if part == "seed" else [f"{part}.{key}" for key in plain[part]]
        key = keys[len(keys) // 2]
        assert refused("train", "data=her2st", f"{key}q=1").endswith(f"did you mean {key}?")


def test_where_no_key_is_near_what_there_is_is_said():
    assert "model has " in refused("train", "model=stnet", "model.zzz=3")
    text = refused("train", "model=stnet", "model.k=3")
    assert "model=bleep and " in text and "model=mclstexp have it" in text
    assert "data=samplesheet has it" in refused("train", "data=her2st", "data.sheet=mine.csv")
    assert "--help-all" in refused("train", "zzzz=1")
    assert "is one value" in refused("train", "model.lr.x=1")
    for key in ("seedd", "model.zzz", "trainer.a.b"):
        assert f"there is no key {key}" in refused("train", f"~{key}")
    assert "there is no key data" in refused("score", "data=demo")  # a group of other commands


def test_keys_that_may_be_added_are_said_to_be():
    timm = "image_encoder=timm"
    assert "+image_encoder.model_args.x=VALUE adds it" in refused("train", timm, "image_encoder.model_args.x=1")
    assert "model_args holds keys of its own" in refused("train", timm, "image_encoder.model_args={x:1}")
    assert "hardware holds keys of its own" in refused("train", "hardware=3")
    assert "model holds keys of its own" in refused("score", "model=3")
    added = compose("train", [timm, "+image_encoder.model_args.x=1", "hardware={threads:2}", "data.quality=null"])
    assert added.image_encoder.model_args == {"x": 1}
    assert added.hardware.threads == 2 and added.data.quality is None


@pytest.mark.parametrize("group", ["data", "model", "protocol", "trainer", "logger", "image_encoder"])
def test_a_choice_that_is_not_there_is_refused_with_those_that_are(group):
    names = [path.stem for path in sorted((CONF / group).glob("*.yaml")) if path.stem != "default"]
    said = refused("train", f"{group}={names[0]}x")
    assert said.startswith(f"{group}={names[0]}x: choose ") and said.endswith(f"did you mean {names[0]}?")
    assert all(name in said for name in names)
    for wrong in ("null", "3", f"[{names[0]},zzz]"):
        assert "choose" in refused("train", f"{group}={wrong}")


def test_values_of_another_kind_are_refused():
    for override, says in (
        ("overwrite=no", "true or false"),
        ("image_encoder.pretrained=null", "true or false"),
        ("model.k=true", "no switch"),
        ("seed=true", "no switch"),
        ("output_dir=", "a name"),
    ):
        assert says in refused("train", override)
    for name in ("score", "export", "predict"):
        assert "run=null: a name" in refused(name, "run=null")
    assert compose("score", ["run=x"]).run == "x"


def test_what_belongs_to_sweeps_is_refused_in_a_run():
    for override in ("hydra.verbose=true", "hydra/launcher=slurm"):
        assert "give -m" in refused("train", override)
    assert "several values need -m" in refused("train", "seed=0,1")
    for override in ("sweep=table1", "dry_run=true"):
        assert "stexp-train -m sweep=" in refused("train", override)
    with pytest.raises(InputError, match=r"no key hydra\.launcher\.gpuss; did you mean hydra\.launcher\.gpus\?"):
        compose("train", ["hydra.launcher.gpuss=[1]"], with_hydra=True)


def test_what_only_hydra_can_judge_is_passed_on_in_one_line():
    for override in ("+seed=3", "seed=${nokey}", "data.leave_out.0=pen", "trainer.max_epochs=${oc.env:STEXP_NOT_SET}"):
        assert refused("train", override).startswith("config: ")


@pytest.mark.parametrize(
    "name",
    [
        "A",
        "10_1",
        "null",
        "True",
        ".5",
        "1e3",
        "a b",
        "x'y",
        "a=b",
        "a,b",
        "[a]",
        "/x (1)/y-s0",
        "B4+C2",
        "é",
        "$x",
        "",
    ],
)
def test_a_name_comes_through_the_command_line_as_it_is(name):
    assert parse([f"fold={quoted(name)}"])[0].value() == name == unquoted(quoted(name))


# what a config may call


FOREIGN = [
    "os.system",
    "builtins.exec",
    "torch.load",
    "subprocess.run",
    "hydra.utils.instantiate",
    "stexp.hardware.os.system",
    "stexp.runs.folder.shutil.rmtree",
    "stexp.config.OmegaConf.load",
    "stexp.files.CONF.joinpath",
    "stexp.construct.ALLOWED.count",
    "stexp.config.build.__call__",
    "pytorch_lightning.loggers.csv_logs.os.system",
    "pytorch_lightning.trainer.trainer.torch.load",
    "stexpevil.run",
    "stexp",
    "stexp.files.CONF",
    "stexp.config.build.__globals__",
    "",
    3,
    None,
]


def test_foreign_targets_are_refused_before_they_run(tmp_path):
    for target in FOREIGN:
        for node in ({"_target_": target, "_args_": [f"touch {tmp_path}/ran"]}, {"inner": [{"_target_": target}]}):
            with pytest.raises(InputError, match=r"_target_ .* is not allowed"):
                build(node)
    assert not (tmp_path / "ran").exists()


def test_targets_that_do_not_exist_are_refused_in_one_line():
    for target in (
        "stexp.protocol.Protocoll",
        "stexp.nothing.here",
        "pytorch_lightning.Trainerr",
        "stexp.",
        "stexp..x",
    ):
        with pytest.raises(InputError, match=r"_target_ .* cannot be found: ") as caught:
            build({"_target_": target})
        assert "\n" not in str(caught.value)


def test_a_misspelt_key_gets_the_nearest_one():
    protocol = {"_target_": "stexp.protocol.Protocol", "name": "x"}
    with pytest.raises(InputError, match=r"stexp.protocol.Protocol takes no key 'holdout'; did you mean hold_out\?"):
        build(protocol | {"holdout": "section"})
    with pytest.raises(InputError, match=r"takes no key 'zzz'$"):
        build(protocol | {"zzz": 1})
    with pytest.raises(InputError, match="takes no key '_partial_'"):
        build(protocol | {"_partial_": True})


def test_a_package_that_is_not_installed_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr("lightning_fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", False)
    with pytest.raises(InputError, match=r"TensorBoardLogger: Neither `tensorboard` nor `tensorboardX` is available"):
        build(compose("train", ["logger=tensorboard", f"output_dir={tmp_path}"]).logger)


def test_a_protocols_numbers_are_checked():
    for override, says in (
        ("target_sum=0", "above 0"),
        ("target_sum=nan", "above 0"),
        ("panel_size=0", "whole number of at least 1"),
        ("n_hvg=-5", "whole number of at least 1"),
        ("n_hvg=null", "whole number of at least 1"),
        ("min_spots=1.5", "from 0 to 1"),
        ("min_spots=half", "from 0 to 1"),
        ("blocks=2", "3 to "),
        ("name='a:b'", "without slashes and colons"),
    ):
        typed = override.replace("'", "")
        with pytest.raises(InputError, match=rf"^protocol\.{typed}: .*{says}"):
            build(compose("train", [f"protocol.{override}"]).protocol)


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


@pytest.mark.slow
def test_a_runs_config_is_read_and_nothing_in_it_is_executed(strict, tmp_path):
    """Whatever a config names, reading it runs nothing, and building refuses it."""
    content = yaml.safe_load((strict / "config.yaml").read_text())
    content["model"] = {"_target_": "os.system", "name": "x", "command": f"touch {tmp_path}/ran"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    config_of_run = RunFolder(tmp_path).config
    assert config_of_run["model"]["_target_"] == "os.system"
    with pytest.raises(InputError, match=r"os\.system is not allowed"):
        build(config_of_run["model"])
    content["protocol"]["_target_"] = "os.system"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=r"protocol\._target_"):
        RunFolder(tmp_path).require()
    assert not (tmp_path / "ran").exists()


def test_a_runs_config_that_is_no_plain_yaml_is_refused(tmp_path):
    for content in (
        f"a: !!python/object/apply:os.system ['touch {tmp_path}/ran']".encode(),
        b"a: !!python/name:os.system",
        b"a: [1, 2",
        b"3",
        b"",
        b"- 1\n- 2",
        b"\x89HDF\r\n\x1a\n\x00\xff",
        b"\xff\xfe\x00a",
    ):
        (tmp_path / "config.yaml").write_bytes(content)
        with pytest.raises(InputError, match=r"config\.yaml cannot be read: .*overwrite=true") as caught:
            RunFolder(tmp_path).require()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_key_that_was_cut_from_a_runs_config_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)  # its handler would outlive the captured stream
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    with pytest.raises(SystemExit) as caught, config.command():
        RunFolder(tmp_path).require()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("stexp: error: ") and error.count("\n") == 1 and "has no fold, protocol, data, model" in error
    )


@pytest.mark.parametrize(("debug", "lines"), [(None, 1), ("0", 1), ("1", 4)])
@pytest.mark.parametrize("error", [InputError("k=0: one would fit"), FileNotFoundError(2, "no such file", "x.csv")])
def test_what_the_user_can_mend_is_one_line_and_a_traceback_when_it_is_asked_for(
    error, debug, lines, capsys, monkeypatch
):
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    monkeypatch.delenv("STEXP_DEBUG", raising=False)
    if debug is not None:
        monkeypatch.setenv("STEXP_DEBUG", debug)
    with pytest.raises(SystemExit) as caught, config.command():
        raise error
    printed = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and printed[-1].startswith(("stexp: error: k=0: one", "stexp: error: x.csv: no such"))
    assert (len(printed) >= lines > 1 and printed[0].startswith("Traceback")) or len(printed) == lines == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["python", "cuda", "torch"],
)
def test_memory_that_runs_out_is_one_line(error, capsys, monkeypatch):
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    monkeypatch.delenv("STEXP_DEBUG", raising=False)
    with pytest.raises(SystemExit) as caught, config.command():
        raise error
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and "memory ran out" in line


@pytest.mark.parametrize("error", [TypeError("a typo"), KeyError("x"), RuntimeError("shapes")])
def test_a_bug_is_a_traceback_after_a_line_that_says_where_the_run_stands(error, capsys, monkeypatch):
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    monkeypatch.setattr(config.OmegaConf, "to_container", Mock(side_effect=error))
    with pytest.raises(type(error)) as caught, config.command():
        config.to_plain({})
    assert caught.value is error
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{type(error).__name__} (a bug)" in line and "the same command goes on from there" in line


def test_an_error_in_a_file_of_the_user_is_no_bug_of_ours(capsys, monkeypatch):
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    with pytest.raises(KeyError), config.command():
        raise KeyError("a typo")
    (line,) = capsys.readouterr().err.splitlines()
    assert __file__ in line and "(a bug)" not in line


# what a command line reads as something else


def test_a_command_hints_at_names_that_it_read_as_numbers(capsys):
    with pytest.raises(SystemExit) as caught, config.command():
        raise UnknownName("2 sections are not there", ["101", "B9"], ["A1", "10_1"], "data.sections=[{}]")
    assert caught.value.code == 2
    hint = "; without quotes 10_1 is read as 101, so give \"data.sections=['10_1']\""
    assert capsys.readouterr().err == f"stexp: error: 2 sections are not there{hint}\n"


@pytest.mark.parametrize(("name", "read_as"), [("10_1", "101"), ("1_000", "1000"), ("1e3", "1000.0"), ("1.10", "1.1")])
def test_a_name_that_hydra_reads_as_a_number_is_hinted_at(tmp_path, name, read_as):
    value = compose("train", [f"fold={name}"]).fold
    assert str(value) == read_as
    hint = misread(str(value), ["A", "9_1", "with space", "[x", name], "fold={}")
    assert hint == f"; without quotes {name} is read as {read_as}, so give \"fold='{name}'\""
    assert compose("train", [f"fold='{name}'"]).fold == name


@pytest.mark.parametrize("given", ["101", "B", "None"])
def test_a_name_that_is_just_wrong_gets_no_hint(given):
    assert misread(given, ["A", "A1", "007", "x10_1"], "fold={}") == ""


def test_a_folder_without_a_config_is_no_run(tmp_path):
    with pytest.raises(InputError, match=r"is no run folder: it has no config.yaml"):
        RunFolder(tmp_path).require()


@pytest.mark.parametrize(
    "argument", ["data.root=~/data", "data.root=~", "data.root=~me/my x (1)", "data.root='~/data'"]
)
def test_a_home_folder_is_a_value(argument):
    (override,) = parse([argument])
    assert override.value() == argument.partition("=")[2].strip("'")
