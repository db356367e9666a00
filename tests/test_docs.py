"""README and documentation name commands, keys, targets, files and pages that exist; their Python runs."""

from __future__ import annotations

import base64
import functools
import io
import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import stexp
from stexp.config.compose import compose
from stexp.files import CONF

TOP = Path(__file__).parents[1]
README = TOP / "README.md"
NOTEBOOKS = sorted((TOP / "docs" / "tutorials").glob("*.ipynb"))
PAGES = sorted((TOP / "docs").rglob("*.md"))
BY_HAND = [README, TOP / "CONTRIBUTING.md", TOP / "conf" / "README.md", *PAGES, *NOTEBOOKS]
MAKEFILE = (TOP / "Makefile").read_text(encoding="utf-8")
COMMANDS = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["scripts"]
FOLDERS = "src|conf|docs|examples|experiments|containers|tests"


def name_of(path: Path) -> str:
    return path.relative_to(TOP).as_posix()


@functools.cache
def text_of(path: Path) -> str:
    """Markdown of a page; of a notebook, its cells, code in fences."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    return "\n\n".join(
        text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
        for cell, text in zip(cells, texts, strict=True)
    )


def prose_of(path: Path) -> str:
    return re.sub(r"^```.*?^```", "", text_of(path), flags=re.MULTILINE | re.DOTALL)


def command_lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Commands that stand on a line of their own: name and arguments."""
    for line in re.findall(r"^(?: {4})?!?(stexp-[a-z]+ .*)$", text_of(path), re.MULTILINE):
        first, *arguments = shlex.split(line.partition(" 2>")[0], comments=True)
        yield first.removeprefix("stexp-"), arguments


@functools.cache
def known_keys() -> frozenset[str]:
    """Keys of all configs with their dots, and each last part by itself."""
    keys = {"key", "plugins", "sweep", "dry_run", "hydra/launcher", "hydra.searchpath"}

    def walk(node: object, prefix: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                keys.add(f"{prefix}{key}")
                walk(value, f"{prefix}{key}.")

    for path in CONF.rglob("*.yaml"):
        group = path.parent.relative_to(CONF).as_posix().removeprefix(".")
        keys.add(group)
        text = path.read_text(encoding="utf-8")
        of_group = group and "@package _global_" not in text
        walk(yaml.safe_load(text), f"{group.replace('/', '.')}." if of_group else "")
    return frozenset(keys | {key.rpartition(".")[2] for key in keys})


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.slow
def test_the_python_of_the_readme_runs(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    small = functools.partial(stexp.datasets.demo, demo / "data", patients=3, sections_per_patient=1)
    monkeypatch.setattr(stexp.datasets, "demo", small)
    monkeypatch.setenv("STEXP_CACHE", str(demo / "cache"))
    monkeypatch.chdir(tmp_path)
    variables: dict = {}
    exec(compile(code.replace("max_epochs=20", 'max_epochs=1, accelerator="cpu"'), "README.md", "exec"), variables)
    assert variables["held_out"].shape == variables["adata"].shape
    assert (tmp_path / "report.html").stat().st_size and (tmp_path / "genes.png").stat().st_size


@pytest.mark.parametrize("path", BY_HAND, ids=name_of)
def test_links_inside_the_repository_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(path)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = Path(os.path.normpath(path.parent / name)) if name else path
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", text_of(there), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], target
    for role, target in re.findall(r"\{(doc|image|include)\}`*\s?([^`\s]+)", text_of(path)):
        ends = (".md", ".ipynb") if role == "doc" else ("",)
        assert any((path.parent / f"{target}{end}").is_file() for end in ends), target


@pytest.mark.parametrize("path", BY_HAND, ids=name_of)
def test_what_is_named_exists(path: Path) -> None:
    text = text_of(path)
    assert set(re.findall(r"\bstexp-[a-z]+\b(?!-)", text)) <= {*COMMANDS, *re.findall(r"stexp-[a-z]+\.", text)}
    targets = {*re.findall(r"^([a-zA-Z0-9%-]+):", MAKEFILE, re.MULTILINE)}
    targets |= {*re.search(r"^PAPER := (.*)$", MAKEFILE, re.MULTILINE)[1].split()}
    for called in re.findall(r"(?:^|`)make ([a-zA-Z][\w-]*)", text, re.MULTILINE):
        assert called in targets or re.sub(r"-\w+$", "-%", called) in targets, f"make {called}"
    for named in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", text):
        assert (TOP / named).exists(), named
    for span in re.findall(r"`([^`\n]+)`", prose_of(path)):
        for key in re.findall(r"(?:^|[\s\"])([a-z][a-z_./]*)=", span):
            assert key in known_keys() or "(" in span, span


@pytest.mark.parametrize("path", BY_HAND, ids=name_of)
def test_commands_take_the_arguments_that_they_are_shown_with(path: Path) -> None:
    for command, arguments in command_lines(path):
        if command == "report" or (command == "table" and any("sweep=" in argument for argument in arguments)):
            continue
        of_plugin = any(argument.startswith("plugins=") for argument in arguments)
        left = ("sweep=", "dry_run=", "hydra", "plugins=", *(("model", "data=", "image_encoder=") if of_plugin else ()))
        arguments = [argument for argument in arguments if argument != "-m" and not argument.startswith(left)]
        compose(command, [re.sub(r"^(\w+=\w+),.*", r"\1", argument) for argument in arguments])


def test_the_reference_has_every_public_name() -> None:
    page = (TOP / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    missing = [name for name in stexp.__all__ if f"stexp.{name}\n" not in page and f"`stexp.{name}`" not in page]
    assert not missing
    commands = (TOP / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    assert {f"stexp-{name}" for name in re.findall(r"\{command-help\} (\w+)", commands)} == set(COMMANDS)


def test_every_reader_that_a_config_names_is_public() -> None:
    configs = "".join(path.read_text(encoding="utf-8") for path in (TOP / "conf" / "data").glob("*.yaml"))
    readers = set(re.findall(r"stexp\.data\.readers\.\w+\.(read_\w+)", configs)) - {"read_demo"}
    assert readers and readers <= set(stexp.__all__)


def test_the_tables_of_results_are_those_of_the_records() -> None:
    import results  # of experiments/

    assert results.tables() in results.PAGE.read_text(encoding="utf-8")


def test_the_tables_of_completion_are_those_of_the_records() -> None:
    import completion  # of experiments/

    assert completion.tables() in completion.PAGE.read_text(encoding="utf-8")


def test_a_claim_about_sections_rests_on_the_floors_of_each() -> None:
    import results  # of experiments/

    def scores(acg: float, given_depth: float) -> dict:
        return {"pearson_acg": acg, "pearson_heg50": 0.0, "pearson_given_depth": given_depth, "mse": 1.0}

    floors = {"mean": scores(0.0, 0.0), "knn_features": scores(0.1, 0.2), "depth_oracle": scores(0.9, 0.0)}
    sections = {"S1": {"scores": scores(0.2, 0.1), "floors": floors}}
    kept = results.of_sections(sections)
    row = results.by_section([{"name": "run", **kept}]).splitlines()[-1]
    assert "| S1 | **0.200**, 0.100 (knn features) | 0.000, 0.000 (mean) | 0.100, 0.200 (knn features) |" in row


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_is_kept_as_it_ran(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "make docs-notebooks"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and all(output["output_type"] != "error" for output in outputs)
    pictures = {"image/jpeg": "", "image/png": ""}
    said = json.dumps([{**output, "data": {**output.get("data", {}), **pictures}} for output in outputs])
    assert not re.findall(r"/(?:home|root|tmp|work|Users)/[\w./-]+", said), "paths of the machine that it ran on"


@pytest.fixture
def extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TOP / "docs" / "_ext")
    monkeypatch.syspath_prepend(TOP / "docs")


def test_links_of_included_files_lead_to_pages_files_or_nowhere(extensions: None) -> None:
    pytest.importorskip("sphinx")
    from repository_links import rewrite  # of docs/_ext

    page = TOP / "docs" / "contributing.md"
    text = "[a](conf/README.md) [b](src/stexp/errors.py) [c](examples/plugin) [d](https://x.org/y) ![e](a.png)"
    expected = "[a](methods.md) [b](../src/stexp/errors.py) c [d](https://x.org/y) ![e](a.png)"
    assert rewrite(text, TOP / "CONTRIBUTING.md", page) == expected
    assert rewrite("[a](../README.md#install)", TOP / "conf" / "README.md", page) == "[a](index.md#install)"


def test_outputs_are_kept_without_what_was_printed_over_and_with_small_pictures(extensions: None) -> None:
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    from notebooks import LARGE, WIDEST, cleaned  # of docs

    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 2 * WIDEST, 3), np.uint8)).save(noise, "PNG")
    made = nbformat.v4
    outputs = [
        made.new_output("stream", name="stderr", text="1/2\r2/2\rdone\nnext\n"),
        made.new_output("display_data", data={"image/png": base64.b64encode(noise.getvalue()).decode()}),
        made.new_output("display_data", data={"image/png": base64.b64encode(b"small").decode()}),
    ]
    cell = made.new_code_cell("1", outputs=outputs, metadata={"execution": {"iopub.status.busy": "2026"}})
    (kept,) = cleaned(made.new_notebook(cells=[cell])).cells
    assert kept.outputs[0].text == "done\nnext\n" and not kept.metadata
    assert len(noise.getvalue()) > LARGE and set(kept.outputs[1].data) == {"image/jpeg"}
    assert Image.open(io.BytesIO(base64.b64decode(kept.outputs[1].data["image/jpeg"]))).width == WIDEST
    assert set(kept.outputs[2].data) == {"image/png"}
