"""Arguments of a script, and KEY=VALUE of stexp-train among them in any order."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path


def over_folds_and_seeds(description: str, names: Iterable[str], file: str) -> argparse.ArgumentParser:
    """A parser for what is measured by its name, over folds and seeds, into a file of experiments/results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", nargs="+", required=True, metavar="FOLD", help="held out in turn")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    names = list(names)
    listed = ", ".join(f'"{name}"' for name in names)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {listed}")
    parser.add_argument("--output", type=Path, help=f"default: experiments/results/{file}")
    return parser


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """What the parser makes of the command line without its KEY=VALUE, and these."""
    keys = [text for text in sys.argv[1:] if "=" in text and not text.startswith("-")]
    parser.usage = parser.format_usage().removeprefix("usage: ").rstrip() + " KEY=VALUE ..."
    return parser.parse_args([text for text in sys.argv[1:] if text not in keys]), keys


def unfinished(output: Path, keys: list[str], commit: str | None) -> dict:
    """What a script wrote before it was interrupted; nothing where there is no file.

    What other code or other keys measured is no part of one table, and is not written over.
    """
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        return {}
    before = json.loads(output.read_text())
    if before["keys"] != keys or before["commit"] != commit:
        sys.exit(f"{output} is of other keys or another commit; --output names another file, or delete it")
    return before["runs"]
