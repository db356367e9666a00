"""From composed configs to objects, and back from run folders."""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from stexp import construct
from stexp.data.slides.scales import tile_and_scales
from stexp.errors import InputError, UnknownName, in_one_line, is_of_memory

if TYPE_CHECKING:
    from stexp.data.dataset import DataSet  # brings pandas and anndata

HARMLESS = (
    ".*does not have many workers.*",
    ".*in eval mode at the start.*",
    ".*isinstance.treespec.*",
    ".*exists and is not empty.*",
    ".*across ranks is zero.*",
)
"""Warnings of Lightning: worker processes that indexing does not need, frozen encoders, resumed runs, no validation."""


def build(node: Any, **extra: Any) -> Any:
    """Call what a config node names; see :func:`stexp.construct.build`."""
    if isinstance(node, DictConfig) or OmegaConf.is_list(node):
        node = to_plain(node)
    return construct.build(node, **extra)


def to_plain(config: Any) -> Any:
    """A config as dict and list, with every interpolation resolved."""
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = error.full_key
        from_data = "; n_genes, n_positions and n_features of a method come from the data"
        raise InputError(
            f"config: {key} has no value; {key}=VALUE gives one{from_data if str(key).startswith('model.') else ''}"
        ) from None
    except OmegaConfBaseException as error:
        if refused := _refused_by_resolver(error):
            raise refused from None
        raise InputError(f"config: {str(error).splitlines()[0]}") from None


def _refused_by_resolver(error: BaseException | None) -> InputError | None:
    """The error of a resolver of ours, which OmegaConf hides in errors of its own."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def _in_sides(scales: list[float] | None, scales_um: list[float] | None, tile_um: float | None) -> list[float] | None:
    """``${in_sides:...}``: the views of a tile in its sides, for who sees them; the data have them in either unit."""
    scales, scales_um = (None if sides is None else list(sides) for sides in (scales, scales_um))
    return tile_and_scales(tile_um, scales, scales_um)[1]


OmegaConf.register_new_resolver("in_sides", _in_sides, replace=True)


def _whose(error: Exception) -> str:
    """Where an error that nobody foresaw comes from: the line of a plug-in, or a bug of stexp."""
    libraries = {Path(sysconfig.get_path(key)).resolve() for key in ("purelib", "platlib", "stdlib")}
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        places.append((error.filename, error.lineno))
    for name, line in reversed(places):
        path = Path(name).resolve()
        if path.is_relative_to(Path(__file__).resolve().parents[1]):
            break
        if path.is_file() and not any(path.is_relative_to(library) for library in libraries):
            return f"in {path}, line {line}, which is not of stexp"
    return "(a bug)"


@contextmanager
def command() -> Iterator[None]:
    """Run the body of a command: readable logs, and one line on stderr for what the user can mend (status 2).

    Anything else is a traceback after a line that says where the run stands (status 1); ``STEXP_DEBUG=1`` shows the
    traceback of what the user can mend, too.
    """
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
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message=message)
    try:
        yield
    except Exception as error:
        # OmegaConf's: of a run's config that was cut
        if not isinstance(error, InputError | OSError | OmegaConfBaseException) and not is_of_memory(error):
            print(
                f"stexp: stopped by {type(error).__name__} {_whose(error)}; what was finished is whole, and the same "
                f"command goes on from there. Where it happened:",
                file=sys.stderr,
            )
            raise
        if os.environ.get("STEXP_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        print(f"stexp: error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        then = str(interrupt) or "what was finished is whole, and the same command goes on from there"
        print(f"stexp: interrupted; {then}", file=sys.stderr)
        sys.exit(130)


def _one_line(error: Exception) -> str:
    """What the user can mend."""
    if isinstance(error, OmegaConfBaseException):
        return f"config: {str(error).splitlines()[0]}"
    if isinstance(error, UnknownName):
        return str(error) + "".join(misread(name, error.choices, error.typed) for name in error.names)
    return in_one_line(error)


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


def dataset_of(cfg: DictConfig) -> DataSet:
    """The data set that a config describes."""
    from stexp.data.dataset import DataSet  # pandas and anndata, which --help does without

    return DataSet(to_plain(cfg.data), to_plain(cfg.test_data) if cfg.get("test_data") else None)
