"""Where weights come from: files, downloads that are verified and never half-written, the user's cache."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import secrets
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from platformdirs import user_cache_path
from safetensors.torch import load_file
from torch import Tensor

logger = logging.getLogger(__name__)

AUTHORS_COMMIT = "f13b8a634e04f9fde8fa03db125b25af5695d8e1"
ADAPTERS_URL = f"https://raw.githubusercontent.com/ByChelsea/VAND-APRIL-GAN/{AUTHORS_COMMIT}/exps/pretrained"
# A company's mirror of the authors' adapter files goes here.
ADAPTERS_URL_VARIABLE = "ANOMALIB_APRILGAN_ADAPTERS_URL"
# The buffers of an OpenAI archive that are no weights.
_ARCHIVE_CONSTANTS = ("input_resolution", "context_length", "vocab_size")


class WeightsUnavailableError(FileNotFoundError):
    """Weights are neither on this machine nor to be had from the network."""


@dataclass(frozen=True)
class AuthorsAdapters:
    r"""One adapter file of the authors' repository.

    Args:
        file_name: Name in the repository's ``exps/pretrained``.
        git_blob_id: SHA-1 of ``"blob <size>\0"`` and the file's bytes, from the repository's tree.
        trained_on: anomalib's name of the data set whose test images trained it.
    """

    file_name: str
    git_blob_id: str
    trained_on: str


AUTHORS_ADAPTERS = {
    "mvtec": AuthorsAdapters("mvtec_pretrained.pth", "a057cec6c2ba5996baa0160a51e155908156813f", "MVTecAD"),
    "visa": AuthorsAdapters("visa_pretrained.pth", "86d6848c543f8393663d35c0333498ffb5ce9b68", "Visa"),
}


def is_offline() -> bool:
    """Whether the user asked the Hugging Face tools, and so us, to keep off the network."""
    return any(os.environ.get(name, "0").lower() in {"1", "true", "yes", "on"} for name in _OFFLINE_VARIABLES)


_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def authors_adapters(name: str) -> Path:
    """File of the authors' adapters ``"mvtec"`` or ``"visa"``, fetched once into the user's cache.

    Raises:
        WeightsUnavailableError: Not cached, and the network does not give it.
        ValueError: What came has not the bytes that the authors published.
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


def fetch(url: str, target: Path, verify: Callable[[Path], None], timeout: float = 30.0) -> None:
    """Download to ``target``; the name appears only when the file is whole and verified.

    Args:
        url: Address.
        target: Where the file shall lie; its folder is created.
        verify: Called with the finished temporary file; raises where it is not the right one.
        timeout: Seconds without a byte before giving up.

    Raises:
        OSError: The address cannot be read to its end, or the folder cannot be written.
        ValueError: ``verify`` refused the file.
    """
    logger.info("Downloading %s to %s", url, target)
    temporary = _temporary_beside(target)
    try:
        with temporary.open("xb") as file, urllib.request.urlopen(url, timeout=timeout) as response:  # noqa: S310  # https or the user's own mirror
            shutil.copyfileobj(response, file)
            announced = response.headers.get("Content-Length")
            if announced is not None and file.tell() != int(announced):
                msg = f"the connection ended after {file.tell()} of {announced} bytes"
                raise OSError(msg)
        verify(temporary)
        temporary.replace(target)
    except http.client.HTTPException as error:
        msg = f"the transfer broke off: {error!r}"
        raise OSError(msg) from error
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_blob_id(path: Path) -> str:
    r"""Name that git gives to a file's content: SHA-1 of ``"blob <size>\0"`` and the bytes."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def verify_sha256(expected_prefix: str) -> Callable[[Path], None]:
    """A check for :func:`fetch`: the file's SHA-256 begins with these digits."""
    return lambda file: _expect(file, "SHA-256", expected_prefix, sha256(file)[: len(expected_prefix)])


def read_state_dict(path: Path, argument: str, nested_under: str = "state_dict") -> dict[str, Tensor]:
    """Tensors of a weight file: safetensors, a torch file (``weights_only``) or OpenAI's TorchScript archive.

    Args:
        path: The file.
        argument: Name of the user's argument, for the error.
        nested_under: Key under which the tensors may lie.

    Returns:
        Names and tensors on the CPU; the nesting and a ``module.`` prefix are taken off.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or holds something else.
    """
    if not path.is_file():
        msg = f"`{argument}`: no weight file {path}."
        raise FileNotFoundError(msg)
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _read_torch_file(path)
    except Exception as error:  # torch's readers meet a damaged file with a dozen kinds of exceptions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        msg = (
            f"`{argument}`: {path} ({path.stat().st_size} bytes) cannot be read: is it complete, and are these "
            f"weights (.safetensors, .pt, .pth)? The reader says: {reason}"
        )
        raise ValueError(msg) from error
    if isinstance(content, dict) and isinstance(content.get(nested_under), dict):
        content = content[nested_under]
    is_mapping = isinstance(content, dict) and content
    if not is_mapping or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        msg = f"`{argument}`: {path} holds no plain mapping of names to tensors."
        raise ValueError(msg)
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    return content


def _read_torch_file(path: Path) -> Any:  # noqa: ANN401  # whatever the file holds; the caller checks
    if _is_torchscript(path):
        state = torch.jit.load(path, map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
        return {name: value for name, value in state.items() if name not in _ARCHIVE_CONSTANTS}
    return torch.load(path, map_location="cpu", weights_only=True)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file under a temporary name and rename it when it is complete.

    Args:
        path: The final name; its folder is created.
        write: Writes the content to the open file.
    """
    temporary = _temporary_beside(path)
    try:
        with temporary.open("xb") as file:
            write(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_beside(path: Path) -> Path:
    """A free name in the folder of ``path``, which is created. Not tempfile's: that would hide the file from others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def _expect(file: Path, kind: str, expected: str, found: str) -> None:
    if found != expected:
        size = file.stat().st_size
        msg = f"the file has {kind} {found} ({size} bytes), expected {expected}: it is not the published one."
        raise ValueError(msg)
