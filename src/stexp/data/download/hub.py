"""Data sets of the Hugging Face hub that whoever has accepted their terms may download, such as HEST-1k."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile

from stexp.data.download.sources import Entry, Source
from stexp.errors import InputError, did_you_mean

SCHEME = "hf://datasets/"
"""How addresses of the hub begin; ``owner/name/path`` follows."""


def hub_files(source: Source, root: Path, sections: set[str]) -> list[Entry]:
    """Files of sections of a hub's data set; the hub is asked only where one of them is not in `root`.

    Without `sections`, those that are in `root`, which must be some: all of it is too much to be meant.

    Raises
    ------
    InputError
        No such section, the terms were not accepted, or the hub does not answer.
    """
    counts = source.of_section[0]
    if not sections:
        if any(root.glob(counts.format(section="*"))):
            return []
        raise InputError(f"no section of {source.hub} is in {root}; name those to bring, as data.sections=[TENX95]")
    paths = [pattern.format(section=section) for section in sorted(sections) for pattern in source.of_section]
    common = [path.relative_to(root).as_posix() for pattern in source.common for path in root.glob(pattern)]
    # what is there may be of an earlier version of the data set: compared with its record, not with the hub
    entries = [Entry(path, (f"{SCHEME}{source.hub}/{path}",)) for path in paths + common if (root / path).is_file()]
    if common and len(entries) == len(paths + common):
        return entries
    at_hub: dict[str, RepoFile] = {}
    folders = {PurePosixPath(pattern).parent for pattern in source.common + source.of_section}
    with _one_line(source.hub, root):
        api = HfApi()
        api.auth_check(source.hub, repo_type="dataset")
        for folder in folders:
            tree = api.list_repo_tree(source.hub, str(folder) if folder.name else None, repo_type="dataset")
            at_hub |= {file.path: file for file in tree if isinstance(file, RepoFile)}
    ids = {PurePosixPath(path).stem for path in at_hub if fnmatch(path, counts.format(section="*"))}
    if unknown := sorted(sections - ids - {PurePosixPath(entry.path).stem for entry in entries}):
        raise InputError(f"{source.hub} has no section {unknown[0]}{did_you_mean(unknown[0], ids)}")
    paths += [path for path in at_hub if any(fnmatch(path, pattern) for pattern in source.common)]
    for path in sorted({*paths} & {*at_hub} - {entry.path for entry in entries}):
        lfs, digest = at_hub[path].lfs, f"git-sha1:{at_hub[path].blob_id}"
        digest = f"sha256:{lfs.sha256}" if lfs else digest
        entries.append(Entry(path, (f"{SCHEME}{source.hub}/{path}",), at_hub[path].size, digest))
    return entries


def download_from_hub(url: str, part: Path) -> None:
    """Write a file of the hub to `part`, with what came of it before an interrupt."""
    owner, name, path = url.removeprefix(SCHEME).split("/", 2)
    folder = part.with_suffix(".hub")  # the hub's client resumes there
    with _one_line(f"{owner}/{name}", part.parent):
        os.replace(hf_hub_download(f"{owner}/{name}", path, repo_type="dataset", local_dir=folder), part)
    shutil.rmtree(folder)


@contextmanager
def _one_line(dataset: str, root: Path) -> Iterator[None]:
    """Errors of the hub's client as one line that says what to do."""
    try:
        yield
    except Exception as error:  # those of the hub, of HTTP, of xet and of the disk have no common class
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise InputError(
                f"{dataset} is for accounts that accepted its terms: do so at https://huggingface.co/datasets/"
                f"{dataset}, then `hf auth login` (or HF_TOKEN=) with a token of that account that may read it"
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{dataset} cannot be had from the hub ({type(error).__name__}: {reason}); data.download=never does with "
            f"what is in {root}"
        ) from error
