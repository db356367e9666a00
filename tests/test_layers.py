"""The architecture, read from the sources: arrows point down, nothing goes in circles."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "stexp"
LAYERS = (
    "",
    "data",
    "evaluation",
    "models",
    "training",
    "runs",
    "inference",
    "completion",
    "reporting",
    "config",
    "sweeps",
    "api",
)
LAYERS = (*LAYERS, "cli")
"""Subpackages, each of which imports from itself and those before it; "" is the root."""
LAZY = {"stexp"}
"""Modules whose imports inside functions are public names, fetched on first use."""


def sources() -> dict[str, Path]:
    """Module name -> file."""
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of stexp that a file imports anywhere, inside functions and for type checkers too."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports by a relative name"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            out |= {each for each in inner if each in modules} or {node.module}
    return {each for each in out if each in modules and each != name}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    modules = sources()
    return {name: imports(name, path, modules) for name, path in modules.items()}


def layer(module: str) -> int:
    parts = module.split(".")
    return LAYERS.index(parts[1] if len(parts) > 1 and parts[1] in LAYERS else "")


def test_imports_point_down(graph: dict[str, set[str]]) -> None:
    upward = [
        f"{name} -> {other}"
        for name, others in graph.items()
        if name not in LAZY
        for other in others
        if layer(other) > layer(name)
    ]
    assert upward == []


def test_no_import_circle(graph: dict[str, set[str]]) -> None:
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in graph[name] - LAZY:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_every_subpackage_is_a_layer_and_the_root_is_small() -> None:
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} == set(LAYERS) - {""}
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def test_no_file_holds_two_ideas() -> None:
    assert [str(path) for path in PACKAGE.rglob("*.py") if len(path.read_text().splitlines()) > 400] == []


@pytest.mark.parametrize("name", [layer for layer in LAYERS[: LAYERS.index("config")] if layer])
def test_below_config_nothing_takes_a_config_object(name: str) -> None:
    for path in (PACKAGE / name).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] not in ("omegaconf", "hydra"), path
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & {"omegaconf", "hydra"}, path
