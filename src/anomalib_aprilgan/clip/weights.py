"""Weight files from the caches of this machine, or from downloads that are verified and never half-written."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from platformdirs import user_cache_path
from rich.console import Console
from rich.progress import wrap_file

from ..files import sha256, temporary_beside
from . import library
from .architecture import BUILT_IN_CLIPS

logger = logging.getLogger(__name__)

AUTHORS_COMMIT = "f13b8a634e04f9fde8fa03db125b25af5695d8e1"
ADAPTERS_URL = f"https://raw.githubusercontent.com/ByChelsea/VAND-APRIL-GAN/{AUTHORS_COMMIT}/exps/pretrained"
# A company's mirror of the authors' adapter files goes here.
ADAPTERS_URL_VARIABLE = "ANOMALIB_APRILGAN_ADAPTERS_URL"
# Names under which repositories of open_clip models keep their weights, best first.
CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")


TIMM_FILES = ("model.safetensors", "pytorch_model.bin")


class WeightsUnavailableError(FileNotFoundError):
    """Weights are neither on this machine nor to be had from the network."""


class AuthorsAdapters(NamedTuple):
    """A file of the authors' ``exps/pretrained``, its ``git_blob_id``, and the anomalib data it was trained on."""

    file_name: str
    git_blob_id: str
    trained_on: str


AUTHORS_ADAPTERS = {
    "mvtec": AuthorsAdapters("mvtec_pretrained.pth", "a057cec6c2ba5996baa0160a51e155908156813f", "MVTecAD"),
    "visa": AuthorsAdapters("visa_pretrained.pth", "86d6848c543f8393663d35c0333498ffb5ce9b68", "Visa"),
}


def is_offline() -> bool:
    """Whether the user asked the Hugging Face tools, and so us, to keep off the network."""
    variables = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "0").lower() in {"1", "true", "yes", "on"} for name in variables)


def authors_adapters(name: str) -> Path:
    """File of the authors' adapters ``"mvtec"`` or ``"visa"``, fetched once into the user's cache.

    A WeightsUnavailableError says why it cannot be had, a ValueError that other bytes came than were published.
    """
    source = AUTHORS_ADAPTERS[name]
    target = user_cache_path("anomalib_aprilgan") / AUTHORS_COMMIT[:7] / source.file_name
    if target.is_file() and git_blob_id(target) == source.git_blob_id:
        return target
    url = f"{os.environ.get(ADAPTERS_URL_VARIABLE, ADAPTERS_URL).rstrip('/')}/{source.file_name}"
    remedy = f"Fetch {url} elsewhere and put it at {target}, or pass its path: `adapters=/path/to/{source.file_name}`."
    if is_offline():
        msg = f"`adapters={name!r}`: {target} is missing or damaged and HF_HUB_OFFLINE is set. {remedy}"
        raise WeightsUnavailableError(msg)
    try:
        fetch(url, target, lambda file: _expect(file, "git blob id", source.git_blob_id, git_blob_id(file)))
    except OSError as error:
        msg = f"`adapters={name!r}`: {url} could not be fetched ({error}). {remedy}"
        raise WeightsUnavailableError(msg) from error
    return target


def image_statistics(backbone: str, pretrained: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Channel means and standard deviations that weights were trained with; ``None`` where that is not known.

    Those of a file are taken to be what all published weights of the architecture have.
    """
    tags = [pretrained] if library.pretrained_config(backbone, pretrained) else library.pretrained_tags(backbone)
    configs = [library.pretrained_config(backbone, tag) for tag in tags]
    found = {(tuple(config.get("mean") or ()), tuple(config.get("std") or ())) for config in configs}
    (mean, std) = found.pop() if len(found) == 1 else ((), ())
    return (mean, std) if mean and std else None


def find_pretrained(backbone: str, tag: str) -> Path:
    """File with the weights of an architecture's open_clip tag: built in, cached here, or fetched into a cache.

    A WeightsUnavailableError says why it cannot be had, a ValueError that the tag is unknown or other bytes came.
    """
    built_in = BUILT_IN_CLIPS.get(backbone)
    if built_in is not None and tag == built_in.pretrained:
        return built_in.weights
    config = library.pretrained_config(backbone, tag)
    if not config:
        known = [built_in.pretrained] if built_in else library.pretrained_tags(backbone)
        tags = ", ".join(known) or "none: pass a file"
        msg = f"`pretrained` must be a weight file or a tag of {backbone} ({tags}), got {tag!r}."
        raise ValueError(msg)
    argument, remedy = f"`pretrained={tag!r}`", "`pretrained=/path/to/file`"
    return find_published(config.get("url", ""), config.get("hf_hub", ""), argument, backbone, remedy)


def find_published(
    url: str, hub: str, argument: str, backbone: str, remedy: str, names: Sequence[str] = CLIP_FILES
) -> Path:
    """File in the Hugging Face cache (``hub``: ``"owner/name/"``, maybe with a file) or in open_clip's (``url``).

    It is fetched where it is missing; a WeightsUnavailableError says how else it can be given (``remedy``).
    """
    repository, _, file_name = hub.rpartition("/")
    hub_files = ((file_name,) if file_name else names) if repository else ()
    for name in hub_files:
        cached = try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached)
    target = Path.home() / ".cache" / "clip" / Path(url).name  # where open_clip keeps them
    # OpenAI's addresses carry the digest of the file.
    verify = verify_sha256(Path(url).parent.name if "openaipublic" in url else "")
    damage = ""
    if url and target.is_file():
        try:
            verify(target)
        except ValueError as error:
            damage = f" ({error})"  # fetched anew below
        else:
            return target
    places = [f"{repository}/{name} in the Hugging Face cache" for name in hub_files]
    looked = "; ".join([*places, f"{target}{damage}"] if url else places)
    hints = " ".join(clip.hint for clip in BUILT_IN_CLIPS.values())
    remedy = f"Looked for: {looked}. Put the file there, or pass its path: {remedy}. {hints}"
    if is_offline():
        msg = f"{argument}: no weights of {backbone} on this machine and HF_HUB_OFFLINE is set. {remedy}"
        raise WeightsUnavailableError(msg)
    try:
        if repository:
            return _download_from_hub(repository, hub_files)
        fetch(url, target, verify)
    except (OSError, HfHubHTTPError) as error:
        msg = f"{argument}: the weights of {backbone} could not be fetched ({type(error).__name__}). {remedy}"
        raise WeightsUnavailableError(msg) from error
    return target


def _download_from_hub(repository: str, names: Sequence[str]) -> Path:
    *others, last = names
    for name in others:
        try:
            return Path(hf_hub_download(repository, name))
        except LocalEntryNotFoundError:
            raise  # no network, rather than no such file
        except EntryNotFoundError:
            continue
    return Path(hf_hub_download(repository, last))


def fetch(url: str, target: Path, verify: Callable[[Path], None], timeout: float = 30.0) -> None:
    """Download to ``target``; the name appears only when the file is whole and ``verify`` has not raised.

    ``torch.hub.download_url_to_file`` waits for ever where a server falls silent, and takes a body that ends early for
    a whole one. Here both are an OSError, the first after ``timeout`` seconds without a byte.
    """
    logger.info("Downloading %s to %s", url, target)
    with temporary_beside(target) as temporary:
        try:
            with temporary.open("xb") as file, urllib.request.urlopen(url, timeout=timeout) as response:  # noqa: S310  # https or the user's own mirror
                announced = response.headers.get("Content-Length")
                total = None if announced is None else int(announced)
                console = Console(stderr=True)
                with wrap_file(response, total or 0, description=target.name, console=console) as body:
                    shutil.copyfileobj(body, file)
                if total not in {None, file.tell()}:
                    msg = f"the connection ended after {file.tell()} of {total} bytes"
                    raise OSError(msg)
        except http.client.HTTPException as error:
            msg = f"the transfer broke off: {error!r}"
            raise OSError(msg) from error
        verify(temporary)


def git_blob_id(path: Path) -> str:
    r"""Name that git gives to a file's content: SHA-1 of ``"blob <size>\0"`` and the bytes."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def verify_sha256(expected_prefix: str) -> Callable[[Path], None]:
    """A check for ``fetch``: the file's SHA-256 begins with these digits."""
    return lambda file: _expect(file, "SHA-256", expected_prefix, sha256(file)[: len(expected_prefix)])


def _expect(file: Path, kind: str, expected: str, found: str) -> None:
    if found != expected:
        size = file.stat().st_size
        msg = f"the file has {kind} {found} ({size} bytes), expected {expected}: it is not the published one."
        raise ValueError(msg)
