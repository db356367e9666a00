"""Objects from plain data; what may be called is tested on configs, in test_config."""

from __future__ import annotations

import datetime
import os.path
import re

import pytest

from stexp import config, construct
from stexp.errors import InputError
from stexp.protocol import Protocol


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("stexp.protocol.Protocol", Protocol),
        ("os.path.join", os.path.join),
        ("datetime.datetime.now", datetime.datetime.now),
        ("stexp.construct", construct),
    ],
)
def test_a_dotted_path_names_what_python_would_import(path, found):
    assert construct.get_object(path) == found


def test_a_module_that_nobody_imported_yet_is_found(tmp_path, monkeypatch):
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "__init__.py").write_text("")
    (tmp_path / "outer" / "inner.py").write_text("VALUE = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert construct.get_object("outer.inner.VALUE") == 7
    with pytest.raises(InputError, match="OTHER"):
        construct.get_object("outer.inner.VALUE.OTHER")


def test_plain_data_come_back_as_they_are_and_inner_nodes_are_built_first():
    node = {"a": [1, {"_target_": "stexp.protocol.Protocol", "name": "x"}], "b": None}
    assert construct.build(node) == {"a": [1, Protocol("x")], "b": None}
    assert construct.build({"_target_": "stexp.protocol.Protocol", "name": "x"}, k=9, nobody_takes=1) == Protocol(
        "x", k=9
    )


def test_a_config_and_plain_data_build_the_same():
    from omegaconf import OmegaConf

    node = {"_target_": "stexp.protocol.Protocol", "name": "y", "hold_out": "section"}
    assert config.build(OmegaConf.create(node)) == construct.build(node)
    for make in (config.build, construct.build):
        with pytest.raises(InputError, match="is not allowed"):
            make(node | {"_target_": "stexp.construct.importlib.import_module", "name": "os"})


def test_a_key_that_lacks_is_one_line():
    with pytest.raises(InputError, match=r"^stexp\.data\.section\.Section lacks the key 'patient'$"):
        construct.build({"_target_": "stexp.data.section.Section", "name": "x"})


@pytest.mark.parametrize("name", sorted(name for name in construct.MOVED if ".readers." in name))
def test_readers_named_by_earlier_versions_are_those_of_today(name):
    with pytest.raises(InputError, match=f"^{re.escape(construct.MOVED[name])} takes no key 'depth'"):
        construct.build({"_target_": name, "depth": 1})


@pytest.mark.parametrize("name", ["formats.read_counts", "spaceranger.read_10x_counts", "visium_image.find_image"])
def test_of_the_functions_of_readers_only_the_reader_may_be_called(name):
    with pytest.raises(InputError, match="is not allowed"):
        construct.build({"_target_": f"stexp.data.readers.{name}", "path": "x"})


@pytest.mark.parametrize("error", [TypeError, ValueError, KeyError, RuntimeError, AttributeError, ImportError])
def test_a_bug_in_a_class_of_ours_comes_as_it_is(monkeypatch, error):
    def with_a_bug(self, n_genes):
        raise error("a typo")

    monkeypatch.setattr("stexp.models.mean.Mean.__init__", with_a_bug)
    with pytest.raises(error, match="a typo") as caught:
        construct.build({"_target_": "stexp.models.mean.Mean", "n_genes": 3})
    assert caught.type is error


def test_what_lightning_refuses_is_one_line():
    for changed in ({"devices": "many"}, {"precision": "banana"}, {"accelerator": "abacus"}):
        with pytest.raises(InputError, match=r"^pytorch_lightning\.Trainer: ") as caught:
            construct.build({"_target_": "pytorch_lightning.Trainer", "logger": False, "accelerator": "cpu", **changed})
        assert "\n" not in str(caught.value)


def test_what_a_module_raises_while_it_is_imported_comes_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "outer_with_bug").mkdir()
    (tmp_path / "outer_with_bug" / "__init__.py").write_text("")
    (tmp_path / "outer_with_bug" / "inner.py").write_text("import package_that_is_nowhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="package_that_is_nowhere"):
        construct.get_object("outer_with_bug.inner.Method")
    with pytest.raises(InputError, match=r"there is no outer_with_bug\.iner; did you mean inner\?"):
        construct.get_object("outer_with_bug.iner")


def test_targets_of_earlier_versions_are_found_where_they_are_today():
    for old, new in construct.MOVED.items():
        assert construct.get_object(old) is construct.get_object(new)
        assert not old.startswith("stexp.training.")


def test_an_old_target_builds_as_the_new_one_does():
    node = {"_target_": "stexp.models.image_encoders.ImageEncoder", "name": "test_resnet", "pretrained": False}
    encoder = construct.build(node)
    assert type(encoder).__module__ == "stexp.models.encoders.image"
