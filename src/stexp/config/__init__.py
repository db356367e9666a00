"""From composed configs to objects, and back from run folders."""

from __future__ import annotations

import errno
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from stexp import construct
from stexp.construct import ALLOWED as ALLOWED
from stexp.construct import get_object as get_object
from stexp.errors import InputError

if TYPE_CHECKING:
    from stexp.data.datamodule import SpotDataModule
    from stexp.data.section import Section
    from stexp.protocol import Protocol

_PACKAGED = Path(__file__).parents[1] / "conf"
CONF = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[3] / "conf"
"""The configs: inside an installed package, or at the top of a checkout."""


def build(node: Any, **extra: Any) -> Any:
    """Call what a config node names; see :func:`stexp.construct.build`."""
    if isinstance(node, DictConfig) or OmegaConf.is_list(node):
        node = to_plain(node)
    return construct.build(node, **extra)


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
        cfg = OmegaConf.create(OmegaConf.to_container(OmegaConf.load(path)))
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be read: {reason}; train again with overwrite=true") from error
    if not OmegaConf.is_dict(cfg) or not cfg:
        raise InputError(f"{path} cannot be read: it holds no keys; train again with overwrite=true")
    return cfg


def protocols() -> dict[str, DictConfig]:
    """The protocols of ``conf/protocol`` by name."""
    return {path.stem: OmegaConf.load(path) for path in sorted((CONF / "protocol").glob("*.yaml"))}


def other_protocols(own: Protocol) -> dict[str, Protocol]:
    """The protocols that a run is scored under besides its own: those with another truth or other highest genes."""
    built = {name: build(node) for name, node in protocols().items() if name != own.name}
    return {name: p for name, p in built.items() if p.hold_out != "block" and p.scoring != own.scoring}


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
    for chatty in ("anndata", "fsspec", "httpx", "huggingface_hub", "pytorch_lightning", "tifffile", "timm"):
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
    except OmegaConfBaseException as error:  # of a run's config that was cut
        print(f"stexp: error: config: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stexp: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder that is written; InputError where another process does. It is made where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise InputError(f"another process is at work in {folder}; wait for it, or choose another output_dir") from None


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
                + "".join(misread(name, there, "data.sections=[{}]") for name in unknown)
            )
        sections = [section for section in sections if section.name in names]
    _refuse_copies(sections)
    if cfg.data.um_per_px is not None:
        if not isinstance(cfg.data.um_per_px, int | float) or not 0 < cfg.data.um_per_px < float("inf"):
            raise InputError(f"data.um_per_px={cfg.data.um_per_px}: a number above 0 (say 0.5) would fit")
        sections = [replace(section, um_per_px=float(cfg.data.um_per_px)) for section in sections]
    return _leave_out(cfg, sections) if cfg.data.leave_out else sections


def _refuse_copies(sections: list[Section]) -> None:
    """A section listed twice could train and be tested, and no split by name would see it."""
    seen: dict[tuple, str] = {}
    for section in sections:
        counts = section.spots.X
        key = (counts.shape, float(counts.sum()), hash(counts.data.tobytes()), hash(counts.indices.tobytes()))
        if key in seen and counts.nnz:
            raise InputError(f"sections {seen[key]} and {section.name} hold the same counts; list them once")
        seen[key] = section.name


def _leave_out(cfg: DictConfig, sections: list[Section]) -> list[Section]:
    from stexp.data.quality import leave_out
    from stexp.data.slides.tiles import TileSpec, open_tiles

    flags = [cfg.data.leave_out] if isinstance(cfg.data.leave_out, str) else [str(name) for name in cfg.data.leave_out]
    spec = TileSpec(cfg.data.tile_px, cfg.data.tile_um)
    thresholds = build(cfg.data.quality)
    kept = (cfg.data.cache_dir, cfg.data.tile_store)
    return leave_out(sections, flags, thresholds, spec, lambda section: open_tiles(section, spec, *kept))


def misread(given: str, names: Iterable[str], typed: str) -> str:
    """Where `given` is how a command line reads one of `names` (10_1 is the number 101): what to type instead.

    Parameters
    ----------
    typed
        The argument, with ``{}`` where the name goes.

    Returns
    -------
    str
        The end of a sentence, or nothing.
    """
    # a loaded model imports this module, and needs no Hydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parse = OverridesParser.create().parse_override
    for name in names:
        try:
            value = parse(f"name={name}").value()
        except HydraException:  # not a value without quotes
            continue
        if not isinstance(value, str) and str(value) == given:
            quoted = typed.format(f"'{name}'")
            return f'; without quotes {name} is read as {given}, so give "{quoted}"'
    return ""


def panel_of(cfg: DictConfig, protocol: Protocol) -> list[str] | None:
    """The gene list a config names: its own, or the paper's under its protocol; None where genes are chosen."""
    from stexp.data.genes import read_panel

    file = cfg.data.panel_file or (cfg.data.published_panel_file if protocol.published else None)
    return None if file is None else read_panel(file)


def build_data(
    cfg: DictConfig, sections: list[Section], protocol: Protocol, fold: str, panel: list[str] | None = None
) -> SpotDataModule:
    """The data module of a config; `panel` takes the place of the genes it would choose."""
    from stexp.data.datamodule import SpotDataModule

    panel = panel or panel_of(cfg, protocol)
    data = to_plain(cfg.data)
    # a reader's own options stand in the data set's config under the names that the reader gives them
    of_reader = set(data["reader"]) - set(inspect.signature(SpotDataModule).parameters) - {"_target_"}
    taken = {key: value for key, value in data.items() if key not in _OF_THE_FRAME | of_reader}
    return build(taken, sections=sections, protocol=protocol, fold=fold, panel=panel, seed=cfg.seed)


# keys of a data set that are for what comes before the data module
_OF_THE_FRAME = {
    *("name", "root", "source", "download", "mirror", "keep_archives", "reader"),
    *("sections", "sections_of", "published_sections", "panel_file", "published_panel_file"),
    *("um_per_px", "quality", "leave_out"),
}
