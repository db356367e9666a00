"""Arguments of scripts and keys on one line, and what an interrupted script left."""

from __future__ import annotations

import argparse
import json
import sys

import pytest
from keyed_arguments import parse, unfinished


@pytest.mark.parametrize(
    "line",
    [
        "--folds B C --seeds 0 1 data=her2st model.ranks=[3,5]",
        "data=her2st --folds B C model.ranks=[3,5] --seeds 0 1",
        "data=her2st model.ranks=[3,5] --seeds 0 1 --folds B C",
    ],
)
def test_keys_stand_anywhere(line, monkeypatch, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--folds", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    monkeypatch.setattr(sys, "argv", ["script.py", *line.split()])
    args, keys = parse(parser)
    assert (args.folds, args.seeds, keys) == (["B", "C"], [0, 1], ["data=her2st", "model.ranks=[3,5]"])
    monkeypatch.setattr(sys, "argv", ["script.py", "--unknown"])
    with pytest.raises(SystemExit):
        parse(parser)
    assert "KEY=VALUE" in capsys.readouterr().err, "that there are keys is said"


def test_what_was_measured_otherwise_is_not_written_over(tmp_path):
    output = tmp_path / "new" / "x.json"
    assert unfinished(output, ["a=1"], "c0") == {} and output.parent.is_dir()
    output.write_text(json.dumps({"keys": ["a=1"], "commit": "c0", "runs": {"whole": {}}}))
    assert unfinished(output, ["a=1"], "c0") == {"whole": {}}
    for keys, commit in ((["a=2"], "c0"), (["a=1"], "c1")):
        with pytest.raises(SystemExit, match=f"{output}.*--output"):
            unfinished(output, keys, commit)
    assert json.loads(output.read_text())["runs"] == {"whole": {}}
