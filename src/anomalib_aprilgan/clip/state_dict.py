"""Weight files, read without running anything that they hold."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..files import check_no_bomb, damaged, is_file

# The buffers of an OpenAI archive that are no weights.
_ARCHIVE_CONSTANTS = ("input_resolution", "context_length", "vocab_size")
_NUMBERS = {f"{name}Storage": name.lower() for name in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Bool")}


def read_state_dict(
    path: Path, argument: str, nested_under: str = "state_dict", *, torchscript: bool = False
) -> dict[str, Tensor]:
    """Tensors of a safetensors or torch file (``weights_only``) on the CPU, without a ``module.`` prefix.

    They may lie under the key ``nested_under``. With ``torchscript`` OpenAI's archives are accepted, whose code never
    runs. Content that is damaged, something else or not finite is a ValueError, which names the user's ``argument``.
    """
    if not is_file(path):
        msg = f"`{argument}`: no weight file {path}."
        raise FileNotFoundError(msg)
    is_archive = _is_torchscript(path)
    if is_archive and not torchscript:
        msg = f"`{argument}`: {path} is a TorchScript archive; pass a .pth or .safetensors file of tensors."
        raise ValueError(msg)
    try:
        content: Any
        check_no_bomb(path)
        if is_archive:
            content = _read_archive(path)
        elif path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's readers meet a damaged file with a dozen kinds of exceptions
        question = ": is it complete, and are these weights (.safetensors, .pt, .pth)?"
        raise damaged(argument, path, question, error) from error
    if isinstance(content, dict) and isinstance(content.get(nested_under), dict):
        content = content[nested_under]
    is_mapping = isinstance(content, dict) and content
    if not is_mapping or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        msg = f"`{argument}`: {path} holds no plain mapping of names to tensors."
        raise ValueError(msg)
    not_finite = [name for name, value in content.items() if not value.isfinite().all()]
    if not_finite:
        msg = f"`{argument}`: {path} must hold finite weights, got NaN or infinity in {', '.join(not_finite[:5])}."
        raise ValueError(msg)
    prefix = "module." if all(name.startswith("module.") for name in content) else ""
    return {name.removeprefix(prefix): value for name, value in content.items()}


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False  # the reader will tell what is wrong with it


class _Module:
    """Stands for a module of an archive: its attributes without its code."""

    class_name = ""
    attributes: dict[str, object]

    def __setstate__(self, attributes: dict[str, object]) -> None:
        self.attributes = attributes


class _ArchiveUnpickler(pickle.Unpickler):
    """Builds tensors, and a ``_Module`` for every module, whatever the pickle asks for."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(archive.open(f"{folder}/data.pkl"))
        self.archive, self.folder = archive, folder
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> object:
        """What stands for a name that tensors and modules need; made anew, because a pickle can set its attributes."""
        if module.partition(".")[0] == "__torch__":
            return type(name, (_Module,), {"class_name": f"{module}.{name}"})
        if module == "torch" and name in _NUMBERS:
            return getattr(torch, _NUMBERS[name])
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda flat, offset, size, stride, *_: flat.as_strided(size, stride, offset)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle":  # lists and dictionaries with their types
            return lambda value, *_: value
        msg = f"the archive asks for {module}.{name}"
        raise pickle.UnpicklingError(msg)

    def persistent_load(self, pid: tuple[str, torch.dtype, str, str, int]) -> Tensor:
        """The numbers of a storage, flat."""
        _, dtype, key, _, count = pid
        if key not in self.storages:
            raw = bytearray(self.archive.read(f"{self.folder}/data/{key}"))
            flat = torch.frombuffer(raw, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
            self.storages[key] = flat
        return self.storages[key]


def _read_archive(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of a TorchScript archive, as ``torch.jit.load(path).state_dict()`` has them."""
    with zipfile.ZipFile(path) as archive:
        folder = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).partition("/")[0]
        declared = _declared_tensors(archive, f"{folder}/code/")
        root = _ArchiveUnpickler(archive, folder).load()

    def collect(module: _Module, prefix: str) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, value in module.attributes.items():
            if isinstance(value, _Module):
                tensors |= collect(value, f"{prefix}{name}.")
            elif isinstance(value, Tensor) and name in declared[module.class_name]:
                tensors[prefix + name] = value
        return tensors

    return {name: value for name, value in collect(root, "").items() if name not in _ARCHIVE_CONSTANTS}


def _declared_tensors(archive: zipfile.ZipFile, folder: str) -> dict[str, set[str]]:
    """Names of the parameters and buffers of every class, from the text of the archive's code."""
    declared = {}
    for path in archive.namelist():
        if path.startswith(folder) and path.endswith(".py"):
            module = path.removeprefix(folder).removesuffix(".py").replace("/", ".")
            for text in re.split(r"^class ", archive.read(path).decode(), flags=re.MULTILINE)[1:]:
                lists = re.findall(r"^  __(?:parameters|buffers)__ = \[(.*)\]$", text, flags=re.MULTILINE)
                declared[f"{module}.{text.partition('(')[0]}"] = set(re.findall(r'"([^"]+)"', " ".join(lists)))
    return declared
