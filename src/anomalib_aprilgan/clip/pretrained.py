"""The file with a published CLIP's weights: from the caches where others keep it, else downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from .registry import BUILT_IN_CLIPS
from .weights import WeightsUnavailableError, fetch, is_offline, verify_sha256

# Names under which repositories of open_clip models keep their weights, best first.
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")


def find_pretrained(url: str, hub: str, argument: str, backbone: str) -> Path:
    """File of published weights, in the Hugging Face cache, in open_clip's, or fetched into one of them.

    Args:
        url: Address, where open_clip knows one.
        hub: ``"owner/name/"`` or ``"owner/name/file"`` on the Hugging Face hub, where open_clip knows one.
        argument: The user's argument, for the error.
        backbone: Name of the architecture, for the error.

    Raises:
        WeightsUnavailableError: In no cache, and the network may not be used or does not give it.
        ValueError: The fetched file has not the published digest.
    """
    repository, _, file_name = hub.rpartition("/")
    hub_files = ((file_name,) if file_name else _HUB_FILES) if hub else ()
    for name in hub_files:
        cached = try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached)
    target = Path.home() / ".cache" / "clip" / Path(url).name  # where open_clip keeps them
    # OpenAI's addresses carry the digest of the file.
    digest = Path(url).parent.name if "openaipublic" in url else ""
    damaged = ""
    if url and target.is_file():
        try:
            verify_sha256(digest)(target)
        except ValueError as error:
            damaged = f" ({error})"  # fetched anew below
        else:
            return target
    places = [f"{repository}/{name} in the Hugging Face cache" for name in hub_files]
    places += [f"{target}{damaged}"] if url else []
    hints = " ".join(clip.hint for clip in BUILT_IN_CLIPS.values())
    remedy = (
        f"Looked for: {'; '.join(places)}. Put the file there, or pass its path: `pretrained=/path/to/file`. {hints}"
    )
    if is_offline():
        msg = f"{argument}: no weights of {backbone} on this machine and HF_HUB_OFFLINE is set. {remedy}"
        raise WeightsUnavailableError(msg)
    try:
        if hub:
            return _download_from_hub(repository, hub_files)
        fetch(url, target, verify_sha256(digest))
    except (OSError, HfHubHTTPError) as error:
        msg = f"{argument}: the weights of {backbone} could not be fetched ({type(error).__name__}). {remedy}"
        raise WeightsUnavailableError(msg) from error
    return target


def _download_from_hub(repository: str, names: Sequence[str]) -> Path:
    """The first of these files that the repository has."""
    *others, last = names
    for name in others:
        try:
            return Path(hf_hub_download(repository, name))
        except LocalEntryNotFoundError:
            raise  # no network, rather than no such file
        except EntryNotFoundError:
            continue
    return Path(hf_hub_download(repository, last))
