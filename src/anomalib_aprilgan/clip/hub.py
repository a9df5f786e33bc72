"""Adapters on the Hugging Face hub: a safetensors file in a model repository, read and written with its client."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from .weights import WeightsUnavailableError, is_offline

SCHEME = "hf://"
ADAPTERS_FILE = "adapters.safetensors"
CARD_FILE = "README.md"
# The hub's names: letters, digits and "-_." without two of the signs in a row; a branch, a tag or a commit.
_PART = r"[A-Za-z0-9_]+(?:[-._][A-Za-z0-9_]+)*"
_SOURCE = re.compile(rf"{SCHEME}(?P<repository>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9_][A-Za-z0-9_./-]*))?")


class HubAdapters(NamedTuple):
    """A file of adapters in the cache, and where it is from: ``hf://owner/name@commit``."""

    path: Path
    source: str


def is_on_hub(source: str) -> bool:
    """Whether a source of adapters is meant to be a repository of the hub."""
    return source.startswith(SCHEME)


def check_hub_source(argument: str, source: str) -> tuple[str, str | None]:
    """Repository and revision (``None``: the default branch) of ``hf://owner/name[@revision]``, or a ValueError."""
    match = _SOURCE.fullmatch(source)
    if match is None:
        msg = (
            f"`{argument}` on the Hugging Face hub must be hf://owner/name or hf://owner/name@revision, got {source!r}."
        )
        raise ValueError(msg)
    return match["repository"], match["revision"]


def find_adapters(source: str) -> HubAdapters:
    """The adapters of ``hf://owner/name[@revision]``, from the Hugging Face cache or downloaded into it.

    A branch or tag is looked up on the hub; without the network, what the cache has of it is taken.

    Raises:
        ValueError: The source is not of this form.
        WeightsUnavailableError: The adapters are neither in the cache nor to be had from the hub.
    """
    repository, revision = check_hub_source("adapters", source)
    offline = is_offline()
    try:
        file = Path(hf_hub_download(repository, ADAPTERS_FILE, revision=revision, local_files_only=offline))
    except (OSError, HfHubHTTPError) as error:
        where = f"{ADAPTERS_FILE} of {repository}" + (f" at {revision}" if revision else "")
        if isinstance(error, LocalEntryNotFoundError):
            reason = "HF_HUB_OFFLINE is set" if offline else "the hub does not answer"
            reason = f"it is not in the Hugging Face cache and {reason}"
        elif isinstance(error, EntryNotFoundError):
            reason = "the repository has no such file"
        else:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error) else repr(error)
        remedy = (
            f"Check the name and your access (`hf auth login`), or pass a file: `adapters=/path/to/{ADAPTERS_FILE}`."
        )
        msg = f"`adapters={source!r}`: {where} could not be fetched: {reason}. {remedy}"
        raise WeightsUnavailableError(msg) from error
    commit = file.parent.name  # .../snapshots/<commit>/<file>, in every version of the cache
    return HubAdapters(file, f"{SCHEME}{repository}@{commit}")


def push(repository: str, files: Mapping[str, bytes], *, private: bool, token: str | None) -> str:
    """Write files to a model repository in one commit, and create it where it is missing.

    Returns:
        ``hf://owner/name@commit``.

    Raises:
        ValueError: The name is not ``owner/name``.
        ConnectionError: The hub is out of reach, or refuses.
    """
    check_hub_source("repository", f"{SCHEME}{repository}")
    if "@" in repository:
        msg = f"`repository` must be owner/name without a revision, got {repository!r}."
        raise ValueError(msg)
    if is_offline():
        msg = f"`repository={repository!r}`: nothing can be pushed while HF_HUB_OFFLINE is set."
        raise ConnectionError(msg)
    api = HfApi(token=token)
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(repository, operations, commit_message="Adapters for APRIL-GAN (anomalib-aprilgan)")
    except (OSError, HfHubHTTPError) as error:
        msg = f"`repository={repository!r}`: the hub did not take the adapters: {type(error).__name__}: {error}"
        raise ConnectionError(msg) from error
    return f"{SCHEME}{repository}@{commit.oid}"
