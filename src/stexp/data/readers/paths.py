"""Paths and names of sections as users give them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from stexp.errors import InputError, did_you_mean

log = logging.getLogger(__name__)


def user_path(path: str | Path) -> Path:
    """A path with ``~`` as the home folder, which shells leave alone after ``key=``."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: {error}") from None


def folders_by_section(outs: Iterable[Path]) -> dict[str, Path]:
    """Output folders of 10x by the section's name: the folder's own, or that around a folder ``outs``.

    Raises
    ------
    InputError
        Two of one name.
    """
    folders: dict[str, Path] = {}
    for path in outs:
        own = Path(os.path.abspath(path))  # resolve() would call a link by what it leads to
        name = own.parent.name if own.name == "outs" else own.name
        if name in folders:
            raise InputError(f"{folders[name]} and {path} would both be section {name}; rename one")
        folders[name] = path
    return folders


def data_folder(root: str | Path, is_data: Callable[[Path], bool], below: Iterable[str] = ()) -> Path:
    """The folder of a data set, from whatever natural place in it a user points at.

    Parameters
    ----------
    root
        The folder itself, the one around it, or a file or folder in it.
    is_data
        Whether a folder is that of the data set.
    below
        What the folder may be called, where `root` is the one around it.

    Returns
    -------
    Path
        `root` where nothing fits, so that whoever asks says what is missing. Another folder than `root` is logged.
    """
    root = user_path(root)
    around = [root.parent, root.parent.parent] if root.exists() else []
    for folder in (root, *(root / name for name in below), *around):
        if folder.is_dir() and is_data(folder):
            if folder != root:
                log.info("data.root=%s: the data lie in %s", root, folder)
            return folder
    return root


def choose_sections(names: Iterable[str], wanted: Iterable[str] | None, place: object) -> list[str]:
    """Of the sections `names` those that are wanted (None: all), in the order of `names`.

    Raises
    ------
    InputError
        One that is not there, or a name that was read as a number: names are compared as they are typed.
    """
    names = list(names)
    if wanted is None:
        return names
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    numbers = [name for name in wanted if not isinstance(name, str)]
    if numbers:
        raise InputError(
            f"data.sections: {numbers[0]!r} is no text; a name that looks like a number needs quotes "
            f"(data.sections=['\"{numbers[0]}\"'])"
        )
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        raise InputError(
            f"no section {', '.join(unknown)} in {place}; there are {', '.join(names[:50])}"
            f"{f' and {len(names) - 50} more' if len(names) > 50 else ''}{did_you_mean(unknown[0], names)}"
        )
    chosen = set(wanted)
    return [name for name in names if name in chosen]
