"""Data sets of the Hugging Face hub that whoever has accepted their terms may download, such as HEST-1k."""

from __future__ import annotations

import os
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
    """
    counts, at_hub = source.of_section[0], dict[str, tuple]()
    if not sections:
        if any(root.glob(counts.format(section="*"))):
            return []
        raise InputError(f"no section of {source.hub} is in {root}; name those to bring, as data.sections=[TENX95]")
    common = {path.relative_to(root).as_posix() for pattern in source.common for path in root.glob(pattern)}
    paths = common | {pattern.format(section=section) for section in sections for pattern in source.of_section}
    # what is there may be of an earlier version of the data set: compared with its record, not with the hub
    present = {path for path in paths if (root / path).is_file()}
    if not common or present != paths:
        at_hub = _listing(source)
        ids = {PurePosixPath(path).stem for path in {*at_hub} | present if fnmatch(path, counts.format(section="*"))}
        if unknown := sorted(sections - ids):
            raise InputError(f"{source.hub} has no section {unknown[0]}{did_you_mean(unknown[0], ids)}")
        paths |= {path for path in at_hub if any(fnmatch(path, pattern) for pattern in source.common)}
    facts = at_hub | dict.fromkeys(present, ())
    return [Entry(path, (f"{SCHEME}{source.hub}/{path}",), *facts[path]) for path in sorted(paths & facts.keys())]


def _listing(source: Source) -> dict[str, tuple]:
    """Size and hash of the files in those folders of a hub's data set that are read."""
    with _one_line(source.hub):
        HfApi().auth_check(source.hub, repo_type="dataset")
        folders = {str(PurePosixPath(pattern).parent) for pattern in source.common + source.of_section}
        trees = [HfApi().list_repo_tree(source.hub, folder.strip("."), repo_type="dataset") for folder in folders]
        files = [file for tree in trees for file in tree if isinstance(file, RepoFile)]
    return {f.path: (f.size, f"sha256:{f.lfs.sha256}" if f.lfs else f"git-sha1:{f.blob_id}") for f in files}


def download_from_hub(url: str, path: Path) -> None:
    """Write a file of the hub to `path`; its client keeps what came before an interrupt beside it."""
    owner, name, file = url.removeprefix(SCHEME).split("/", 2)
    with _one_line(f"{owner}/{name}"):
        os.replace(hf_hub_download(f"{owner}/{name}", file, repo_type="dataset", local_dir=path.parent), path)


@contextmanager
def _one_line(dataset: str) -> Iterator[None]:
    """Errors of the hub's client as one line that says what to do."""
    try:
        yield
    except Exception as error:  # those of the hub, of HTTP, of xet and of the disk have no common class
        reason = f"cannot be had from the hub ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            page = f"https://huggingface.co/datasets/{dataset}"
            reason = f"is for accounts that accepted its terms: do so at {page}, then `hf auth login` (or HF_TOKEN=)"
        raise InputError(f"{dataset} {reason}; data.download=never does with what is there") from error
