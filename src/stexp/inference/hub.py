"""Exported models on the Hugging Face hub: fetched as data that is checked, shared with a card."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from stexp.errors import InputError
from stexp.inference import model_folder
from stexp.inference.card import describe, what_is_shared
from stexp.inference.model_facts import FILES, read_json
from stexp.models.encoders.weights import hub_answers

log = logging.getLogger(__name__)

REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]{1,100}))?", re.ASCII)
"""``owner/name``, or ``owner/name@revision``: a branch, a tag or a commit."""


CLIENT_ERRORS = (OSError, HFValidationError, RuntimeError, *cast(tuple[type[Exception]], HfHubHTTPError.__bases__))
"""What the hub's client raises: of disk and network, of names, of xet (RuntimeError), and of its HTTP library, which is
another one from version to version."""


def names_repository(name: str | Path) -> bool:
    """Whether a text may name a repository; a folder of that name on disk goes first."""
    return isinstance(name, str) and REPOSITORY.fullmatch(name) is not None and not Path(name).exists()


def fetch_model(name: str) -> Path:
    """The files of an exported model, from the hub or from the cache of its client.

    Parameters
    ----------
    name
        See `REPOSITORY`. Of it ``model.json`` is fetched, and those files of a model that this one names.

    Returns
    -------
    Path
        A folder for :func:`stexp.inference.model_folder.read`, which checks it as any other.

    Raises
    ------
    InputError
        No such repository or revision, one for which terms are to be accepted, one that holds no exported model, or
        no answer from the hub.
    """
    repository, revision = _parts(name)
    offline = not hub_answers()  # its client would retry for a minute, and looks into its cache at once
    with _one_line(name, "a folder on disk would fit"):
        first = Path(hf_hub_download(repository, "model.json", revision=revision, local_files_only=offline))
    files, commit = read_json(first).get("files"), first.parent.name
    wanted = [file for file in FILES if isinstance(files, dict) and file in files]
    with _one_line(name, "a folder on disk would fit"):
        for file in wanted:
            hf_hub_download(repository, file, revision=commit, local_files_only=offline)
    log.info("model %s of the hub, at commit %s", repository, commit[:10])
    return first.parent


def push_to_hub(
    model: str | Path,
    repository: str,
    *,
    private: bool = True,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload an exported model, with a model card that is written from what the model says of itself.

    Parameters
    ----------
    model
        A folder that ``stexp-export`` wrote.
    repository
        ``owner/name``; made where it is not there. What it holds of an earlier model is replaced, its card, too.
    private
        False: everyone may read it; a repository that is there and private stays so. An exported model of a method
        that retrieves holds counts and small tiles of its reference spots; every model names the sections it was
        trained on.
    message
        Of the commit; None: method and data.
    token
        Of an account that may write there; None: that of ``hf auth login`` or ``HF_TOKEN``.

    Returns
    -------
    str
        Address of the commit.

    Raises
    ------
    InputError
        `model` is no whole exported model, `repository` no ``owner/name`` or public while `private` is asked for, the
        account may not write there, or the hub does not answer.
    """
    _, revision = _parts(repository)
    if revision is not None:
        raise InputError(f"{repository}: a model is shared as owner/name, without a revision")
    folder = Path(model).expanduser()
    exported = model_folder.read(folder)
    facts, shared = exported.facts, what_is_shared(exported)
    if not hub_answers():
        raise InputError(f"{repository}: the hub does not answer; {folder} is whole, and can be shared later")
    api = HfApi(token=token)
    names = ["model.json", *sorted(facts["files"])]
    card = describe(exported, repository).encode()
    with _one_line(repository, "a repository of yours would fit, and a token that may write (hf auth login)"):
        api.create_repo(repository, private=private, exist_ok=True)
        is_private = bool(api.repo_info(repository).private)  # of one that was there, as it was
        if private and not is_private:
            raise InputError(f"{repository} is public, and {shared}; private=false would fit if all may read that")
        left = set(api.list_repo_files(repository)) & {*FILES} - {*names}
        commit = api.create_commit(
            repository,
            [
                *(CommitOperationAdd(name, str(folder / name)) for name in names),
                CommitOperationAdd("README.md", card),
                *(CommitOperationDelete(name) for name in sorted(left)),
            ],
            commit_message=message or f"{facts['method']} of {facts['data']}, fold {facts['fold']}",
        )
    log.info("%s is %s: %s", repository, "private" if is_private else "public", shared)
    return str(commit.commit_url)


def _parts(name: str) -> tuple[str, str | None]:
    match = REPOSITORY.fullmatch(name)
    if match is None:
        raise InputError(f"{name[:200]} names no repository of the hub; owner/name would fit")
    return match[1], match[2]


@contextmanager
def _one_line(name: str, fits: str) -> Iterator[None]:
    """Errors of the hub's client as one line that says what to do."""
    page = f"https://huggingface.co/{name.partition('@')[0]}"
    try:
        yield
    except InputError:
        raise
    except GatedRepoError as error:  # a kind of RepositoryNotFoundError
        raise InputError(
            f"{name} is for accounts that accepted its terms: do so at {page}, then hf auth login (or HF_TOKEN=) with "
            f"a token of that account"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{name} is neither a folder here nor a model on the hub that this account may read; {fits}"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{name}: {page} has no such revision; a branch, tag or commit of it would fit") from error
    except LocalEntryNotFoundError as error:  # a kind of EntryNotFoundError
        raise InputError(
            f"{name} is no folder here, and cannot be had from the hub: it does not answer, or its client is offline; "
            f"{fits}"
        ) from error
    except EntryNotFoundError as error:
        raise InputError(
            f"{name} on the hub is no exported model: it lacks model.json or a file that this names; what "
            f"stexp-export push_to=owner/name shared would fit"
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise InputError(f"{name}: this account may not do that on the hub; {fits}") from error
        raise InputError(f"{name}: the hub answers {' '.join(str(error).split())[:200]}; try again later") from error
    except CLIENT_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{name}: the hub cannot be used ({type(error).__name__}: {reason}); {fits}") from error
