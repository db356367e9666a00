"""Objects from plain data; what may be called is tested on configs, in test_config."""

from __future__ import annotations

import datetime
import os.path

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
    with pytest.raises(AttributeError, match="OTHER"):
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


def test_values_that_do_not_fit_are_one_line():
    with pytest.raises(InputError, match=r"^stexp\.data\.section\.Section: .*missing 2 required") as caught:
        construct.build({"_target_": "stexp.data.section.Section", "name": "x"})
    assert "\n" not in str(caught.value)
