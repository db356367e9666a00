"""Files of text in a run folder: what a run writes is read, and what does not fit is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fake_run import write_run
from typing_extensions import TypedDict

from stexp.errors import InputError
from stexp.evaluation import records
from stexp.files import write_csv


class Two(TypedDict):
    a: Any
    b: Any


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "x.json does not exist: the run has not got that far; give the command that made the run again"),
        (b"", "x.json cannot be read: Expecting value"),
        (b'{"a": [1, 2', "x.json cannot be read: "),
        (b"\x80\x00", "x.json cannot be read: "),
        (b"[1, 2]", "x.json is no JSON object; delete it"),
        (b'{"a": 1}', "x.json has no b; delete it and give the command that made the run again"),
    ],
)
def test_a_damaged_json_file_is_refused_in_one_line(tmp_path, content, says):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        records.read_json(tmp_path / "x.json", Two)
    assert "\n" not in str(caught.value)


def test_json_comes_back_with_none_for_nan(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"a": float("nan"), "b": {"c": 0.5}}))
    assert records.read_json(tmp_path / "x.json") == {"a": None, "b": {"c": 0.5}}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", spots=20, genes=5)


READ = {"metrics": records.read_metrics, "audit": records.read_audit, "provenance": records.read_provenance}


@pytest.mark.parametrize("name", READ)
def test_what_a_run_wrote_is_read(run: Path, name: str) -> None:
    assert READ[name](run) == json.loads((run / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("metrics", "scores", 3),
        ("metrics", "scores.pearson_acg", "0.3"),
        ("metrics", "floors.mean", None),
        ("metrics", "n_genes", -1),
        ("metrics", "n_spots", 2.5),
        ("metrics", "sections", {}),
        ("metrics", "sections.B1.n_spots", True),
        ("metrics", "chosen", []),
        ("metrics", "chosen.k", 0),
        ("metrics", "scored_as.paper", 1),
        ("audit", "items.0", "x"),
        ("audit", "items.0.leak", "no"),
        ("audit", "facts", None),
        ("audit", "facts.patient_of", {"B1": 3}),
        ("audit", "facts.patient_of", {"B1": "B"}),
        ("provenance", "seconds", -1),
        ("provenance", "hardware.gpu", "H200"),
        ("provenance", "data_manifest.B1", 0),
        ("provenance", "stages", {"fit": "long"}),
    ],
)
def test_a_value_that_no_run_writes_is_refused(run: Path, tmp_path: Path, name: str, key: str, value: Any) -> None:
    content = json.loads((run / f"{name}.json").read_text())
    part: Any = content
    *parents, last = key.split(".")
    for parent in parents:
        part = part[int(parent) if isinstance(part, list) else parent]
    part[int(last) if isinstance(part, list) else last] = value
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"{name}\.json: {key}.*; delete it and give the command") as caught:
        READ[name](tmp_path)
    assert "\n" not in str(caught.value)


def test_genes_are_read_as_they_were_named(tmp_path):
    table = pd.DataFrame({"gene": ["=A", "NA", "'B"], "pearson": [0.1, np.nan, -0.2], "heg50": [True, False, True]})
    write_csv(table, tmp_path / "per_gene.csv")
    assert records.read_genes(tmp_path / "per_gene.csv", "pearson") == [
        {"gene": "=A", "pearson": 0.1, "heg50": 1},
        {"gene": "NA", "pearson": None, "heg50": 0},
        {"gene": "'B", "pearson": -0.2, "heg50": 1},
    ]
