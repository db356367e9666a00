"""YAML and JSON of strangers: bounded, and wrong in one line."""

from __future__ import annotations

import pytest

from stexp.documents import LARGEST, parse_json, parse_yaml
from stexp.errors import InputError
from stexp.evaluation.records import read_json
from stexp.runs.folder import RunFolder

BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "aliases are not read"),
        ("a: &a {b: *a}", "aliases are not read"),
        (DEEP, "nested too deep"),
        ("a: !!python/object/apply:os.getcwd []", "python/object"),
        ("a: [1", "line 1"),
        (" " * (LARGEST + 1), "up to 17 MB"),
    ],
    ids=["bomb", "cycle", "deep", "code", "cut", "large"],
)
def test_what_is_wrong_with_yaml_is_one_line(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)


def test_plain_values_come_as_they_are() -> None:
    assert parse_yaml("a: [1, x, null]\nb: {c: 0.5}") == {"a": [1, "x", None], "b": {"c": 0.5}}
    assert parse_json('{"a": [1, NaN]}', parse_constant=lambda _: None) == {"a": [1, None]}


def test_json_that_is_nested_too_deep_is_one_line() -> None:
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json(DEEP)


def test_files_of_a_run_folder_are_read_so(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text(BOMB)
    with pytest.raises(InputError, match=r"config\.yaml cannot be read: .*aliases"):
        _ = RunFolder(tmp_path).config
    (tmp_path / "metrics.json").write_text(DEEP)
    with pytest.raises(InputError, match=r"metrics\.json cannot be read: nested too deep"):
        read_json(tmp_path / "metrics.json")
