"""From composed configs to objects, and back from run folders."""

from __future__ import annotations

import difflib
import errno
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from stexp import InputError

if TYPE_CHECKING:
    from stexp.data.datamodule import SpotDataModule
    from stexp.data.section import Section
    from stexp.protocol import Protocol

_PACKAGED = Path(__file__).parent / "conf"
CONF = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "conf"
"""The configs: inside an installed package, or at the top of a checkout."""

ALLOWED = ("stexp.", "pytorch_lightning.callbacks.", "pytorch_lightning.loggers.", "pytorch_lightning.trainer.")
"""Where the classes are defined that a config may call; of functions, only ``read`` of a reader."""


def build(node: Any, **extra: Any) -> Any:
    """Call what ``_target_`` names with the other keys as arguments, inner nodes first.

    Parameters
    ----------
    node
        Config node; containers without ``_target_`` come back as plain dict and list.
    extra
        Further arguments of the outermost call, as they are.

    Raises
    ------
    InputError
        A target outside `ALLOWED`, or a key that the target does not take (with the nearest it does).
    """
    if isinstance(node, DictConfig) or OmegaConf.is_list(node):
        node = to_plain(node)
    if isinstance(node, list):
        return [build(item) for item in node]
    if not isinstance(node, dict):
        return node
    arguments = {key: build(value) for key, value in node.items() if key != "_target_"}
    if "_target_" not in node:
        return arguments
    target = node["_target_"]
    try:
        found = get_object(target) if str(target).startswith(("stexp.", "pytorch_lightning.")) else None
    except Exception as error:  # of the import, whatever the module raises
        raise InputError(f"_target_ {target} cannot be found: {' '.join(str(error).split())[:200]}") from error
    # judged by where it is defined: a name may lead through a module's imports to something else
    module = f"{getattr(found, '__module__', '')}."
    is_reader = module.startswith("stexp.data.readers.") and getattr(found, "__name__", "") == "read"
    if not (is_reader or (inspect.isclass(found) and module.startswith(ALLOWED))):
        raise InputError(
            f"_target_ {target} is not allowed; a config may name classes of stexp, Lightning's Trainer, callbacks "
            f"and loggers, and the read function of a reader"
        )
    known = inspect.signature(found).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        for key in arguments:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                raise InputError(f"{target} takes no key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    try:
        return found(**arguments, **extra)
    except InputError:
        raise
    except (TypeError, ValueError) as error:  # of a value that no one checked
        raise InputError(f"{target}: {' '.join(str(error).split())[:300]}") from error


def to_plain(config: Any) -> Any:
    """A config as dict and list, with every interpolation resolved."""
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise InputError(f"config: {str(error).splitlines()[0]}") from None


def load_run(folder: str | Path) -> DictConfig:
    """The resolved config of a run folder; plain data, nothing in it is executed."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise InputError(f"{folder} is no run folder: it has no config.yaml")
    try:
        return OmegaConf.create(OmegaConf.to_container(OmegaConf.load(path)))
    except (YAMLError, OmegaConfBaseException, OSError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error


def protocols() -> dict[str, DictConfig]:
    """The protocols of ``conf/protocol`` by name."""
    return {path.stem: OmegaConf.load(path) for path in sorted((CONF / "protocol").glob("*.yaml"))}


def other_protocols(own: Protocol) -> dict[str, Protocol]:
    """The protocols that a run is scored under besides its own."""
    return {name: build(node) for name, node in protocols().items() if name != own.name}


@contextmanager
def command() -> Iterator[None]:
    """Run the body of a command: readable logs, and one line on stderr for what the user can mend (status 2)."""
    # stderr, so that what a command prints can be piped
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)-7s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    for chatty in ("anndata", "fsspec", "httpx", "huggingface_hub", "pytorch_lightning", "timm"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # of Lightning: worker processes that index batches do not need, frozen encoders, resumed runs, no validation
    for message in (
        ".*does not have many workers.*",
        ".*in eval mode at the start.*",
        ".*isinstance.treespec.*",
        ".*exists and is not empty.*",
        ".*across ranks is zero.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    try:
        yield
    except InputError as error:
        print(f"stexp: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        after = "; what was finished is whole, the same command goes on from there" if full else ""
        print(f"stexp: error: {where}{error.strerror or error}{after}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stexp: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the whole new one."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def load_sections(cfg: DictConfig, protocol: Protocol) -> list[Section]:
    """The sections a config asks for: ``data.sections``, the paper's under its protocol, or all."""
    names = cfg.data.sections
    if isinstance(names, str | int):
        names = [names]
    if names is not None and len(names) == 0:
        raise InputError("data.sections is empty; name some, or leave it out for all")
    if names is None and protocol.published and cfg.data.published_sections is not None:
        names = cfg.data.published_sections
    names = None if names is None else [str(name) for name in names]
    sections = build(OmegaConf.merge(cfg, {"data": {"sections": names}}).data.reader)
    if names is not None:
        there = [section.name for section in sections]
        unknown = [str(name) for name in names if name not in there]
        if unknown:
            raise InputError(
                f"data.sections: {', '.join(unknown)} not in {cfg.data.name}; there are {', '.join(there)}"
            )
        sections = [section for section in sections if section.name in names]
    if cfg.data.um_per_px is not None:
        if not isinstance(cfg.data.um_per_px, int | float) or not 0 < cfg.data.um_per_px < float("inf"):
            raise InputError(f"data.um_per_px={cfg.data.um_per_px}: a number above 0 (say 0.5) would fit")
        sections = [replace(section, um_per_px=float(cfg.data.um_per_px)) for section in sections]
    return sections


def panel_of(cfg: DictConfig, protocol: Protocol) -> list[str] | None:
    """The gene list a config names: its own, or the paper's under its protocol; None where genes are chosen."""
    from stexp.data.genes import read_panel

    file = cfg.data.panel_file or (cfg.data.published_panel_file if protocol.published else None)
    return None if file is None else read_panel(file)


def build_data(
    cfg: DictConfig, sections: list[Section], protocol: Protocol, fold: str, panel: list[str] | None = None
) -> SpotDataModule:
    """The data module of a config; `panel` takes the place of the genes it would choose."""
    panel = panel or panel_of(cfg, protocol)
    taken = {key: value for key, value in to_plain(cfg.data).items() if key not in _NOT_OF_THE_MODULE}
    return build(taken, sections=sections, protocol=protocol, fold=fold, panel=panel, seed=cfg.seed)


_NOT_OF_THE_MODULE = (
    "name",
    "root",
    "sheet",
    "reader",
    "sections",
    "published_sections",
    "panel_file",
    "published_panel_file",
    "um_per_px",
)
