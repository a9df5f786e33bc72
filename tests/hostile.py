"""Wrong, extreme and hostile values, files and images: each gives a result, or an error that says why."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import random
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

NAN, INFINITY = float("nan"), float("inf")
# For any argument.
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 10**9, 2**80, 0.0, 0.5, -0.5, 1.5, 1e-6, 1e300, NAN, INFINITY, -INFINITY,
    "", " ", "nut", "no/such/file.pth", ".", "x" * 10_000, "\n\t\x07", "\N{PILE OF POO}", "\udcff", "{}",
    "${oc.env:HOME}",
    [], [0], [1], [2, 1], [1, 1], ["a", "b"], ["a", ""], [None], [[1]], (96,), (96, 96), (96, 100), (1, 2, 3),
    {}, {"a": "b"}, {"a": ""}, {"": "b"}, {"a": None}, {"a": ["b"]}, {1: 2}, b"bytes", object(), 1j, range(3),
    np.int64(2), np.float32(0.25), np.array([1, 2]), torch.tensor(1), Path("x"), lambda: None,
]  # fmt: skip
LONGEST = 1.0  # seconds of processor time that a case may take


def outcome(case: Callable[[], object], names: Sequence[str], longest: float = LONGEST) -> str:
    """``ok``, or ``refused`` where the error names one of these; else what is wrong with it."""
    started = time.process_time()
    try:
        case()
        result = "ok"
    except (ValueError, TypeError, FileNotFoundError, RuntimeError, OSError) as error:
        text = str(error)
        named = any(f"`{name}" in text or (os.sep in name and name in text) for name in names)
        result = "refused" if named else f"{type(error).__name__} that names nothing: {text[:200]}"
    except Exception as error:  # what must not happen
        result = f"{type(error).__name__}: {str(error)[:200]}"
    seconds = time.process_time() - started
    return result if seconds < longest else f"{seconds:.1f} s; {result}"


# -- images -----------------------------------------------------------------------------------------------------------


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, content: bytes = b"", *, depth: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    """A PNG with any header and any content."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = _chunk(b"IHDR", header) + extra + _chunk(b"IDAT", zlib.compress(content)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def images(draw: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Names and contents of image files, most of them broken."""
    values = np.random.default_rng(draw.randrange(2**32))
    colours = Image.fromarray(values.integers(0, 256, (24, 40, 3)).astype(np.uint8))
    floats = values.random((24, 40)).astype(np.float32)
    whole = {
        "rgb.png": _encoded(colours, "PNG"),
        "rgb.jpg": _encoded(colours, "JPEG"),
        "rgb.bmp": _encoded(colours, "BMP"),
        "rgb.tif": _encoded(colours, "TIFF"),
        "deflate.tif": _encoded(colours, "TIFF", compression="tiff_deflate"),
        "cmyk.jpg": _encoded(colours.convert("CMYK"), "JPEG"),
        "palette.png": _encoded(colours.convert("P"), "PNG", transparency=3),
        "alpha.png": _encoded(colours.convert("LA"), "PNG"),
        "bit.png": _encoded(colours.convert("1"), "PNG"),
        "deep.png": _encoded(Image.fromarray((floats * 65535).astype(np.uint16)), "PNG"),
        "float.tif": _encoded(Image.fromarray(floats), "TIFF"),
        "nan.tif": _encoded(Image.fromarray(np.where(floats > 0.9, NAN, floats).astype(np.float32)), "TIFF"),
        "infinite.tif": _encoded(Image.fromarray(np.where(floats > 0.9, INFINITY, floats).astype(np.float32)), "TIFF"),
        "large.tif": _encoded(Image.fromarray(floats * 1000), "TIFF"),
        "negative.tif": _encoded(Image.fromarray((floats * 1000).astype(np.int32) - 500), "TIFF"),
        "moving.png": _encoded(colours, "PNG", save_all=True, append_images=[colours.rotate(90)]),
        "moving.webp": _encoded(colours, "WEBP", save_all=True, append_images=[colours.rotate(90)]),
        "pages.tif": _encoded(colours, "TIFF", save_all=True, append_images=[colours.convert("L")]),
        "thin.png": _encoded(colours.resize((1, 9000)), "PNG"),
        "dot.png": _encoded(colours.resize((1, 1)), "PNG"),
        "turned.jpg": _encoded(colours, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08" + values.bytes(60)),
        "bomb.png": png(60_000, 60_000),
        "wide_bomb.png": png(2**31 - 1, 1),
        "empty_sides.png": png(0, 0),
        "no_pixels.png": png(40, 40),
        "odd_depth.png": png(8, 8, bytes(300), depth=7),
        "odd_colour.png": png(8, 8, bytes(300), colour=5),
        "no_palette.png": png(8, 8, bytes(80), colour=3),
        "text_bomb.png": png(8, 8, bytes(300), extra=_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**7)))),
        "profile.png": png(8, 8, bytes(300), extra=_chunk(b"iCCP", b"k\0\0" + zlib.compress(values.bytes(500)))),
        "nothing.png": b"",
        "text.png": b"hello",
        "archive.png": b"PK\x03\x04" + bytes(30),
        "page.gif": b"<html></html>",
        "magic.png": b"\x89PNG\r\n\x1a\n",
        "magic.jpg": b"\xff\xd8\xff",
        "magic.tif": b"II*\0\x08\0\0\0",
        "loop.tif": b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 256, 4, 1, 8) + struct.pack("<I", 8),
    }
    yield from itertools.islice(whole.items(), count)
    for number in range(count - len(whole)):
        name, content = draw.choice(list(whole.items()))
        yield f"{number}_{name}", damaged(content, draw)


def damaged(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randrange(1, 8)):
        if changed:
            changed[draw.randrange(len(changed))] = draw.randrange(256)
    how = draw.randrange(4)
    place = draw.randrange(len(changed) + 1)
    if how == 0:
        return bytes(changed[:place])
    if how == 1:
        return bytes(changed[:place] + changed[place + draw.randrange(40) :])
    return bytes(changed)


# -- weights, checkpoints, prompts, configurations ---------------------------------------------------------------------


class _Runs:
    """A pickle of it writes a file, where it is loaded by something that runs what it loads."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.target, "run")


def files(folder: Path, valid: dict[str, Path], canary: Path, draw: random.Random) -> Iterator[tuple[str, Path]]:
    """Kinds (``pretrained``, ``adapters``, ``ckpt_path``, ``prompts``, ``backbone``) and hostile files of them.

    ``valid`` has a whole file of every kind; nothing may ever create ``canary``.
    """
    numbers = itertools.count()

    def write(kind: str, content: bytes, suffix: str) -> tuple[str, Path]:
        path = folder / f"{next(numbers)}{suffix}"
        path.write_bytes(content)
        return kind, path

    def saved(kind: str, content: object, suffix: str = ".pt", **options: Any) -> tuple[str, Path]:
        path = folder / f"{next(numbers)}{suffix}"
        torch.save(content, path, **options)
        return kind, path

    for kind in ("pretrained", "adapters", "ckpt_path"):
        suffix = {"pretrained": ".pt", "adapters": ".pth", "ckpt_path": ".ckpt"}[kind]
        yield saved(kind, _Runs(canary), suffix)
        yield saved(kind, {"state_dict": _Runs(canary), "pytorch-lightning_version": "2.6.0"}, suffix)
        yield write(kind, pickle.dumps(_Runs(canary)), suffix)
        yield write(kind, b"", suffix)
        yield write(kind, b"PK\x05\x06" + bytes(18), suffix)
        yield saved(kind, [1, 2, 3], suffix)
        yield saved(kind, {"a": torch.zeros(2), 3: torch.zeros(1)}, suffix)
        scripted = torch.jit.script(torch.nn.Linear(2, 2))
        torch.jit.save(scripted, path := folder / f"{next(numbers)}{suffix}")
        yield kind, path
        yield kind, folder
        yield kind, folder / "missing" / "file.pt"
        yield kind, folder / ("x" * 300)
    for text in (
        "a: &a [x, x]\nb: &b [*a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b]\nnormal: [*c, *c, *c, *c]",
        "normal: ['${oc.env:HOME} {}']\nanomalous: ['{} {}']", "normal: '{}'", "normal: [1]", "normal: []", "[]", "",
        "normal: ['{0}']", "normal: ['{']", "!!python/object/apply:os.system ['true']", "normal: [" * 500, "\0", "a: 1",
        "classes: [1]", "classes: {nut: {normal: x}}", "templates: ['" + "x" * 1_000_000 + "{}']", "? [a]\n: b",
    ):  # fmt: skip
        yield write("prompts", text.encode(), ".yaml")
    yield write("prompts", b"\xff\xfe\x00", ".yaml")
    yield write("prompts", b"normal: [" + b"'a {}'," * 200_000 + b"]", ".yaml")
    config = json.loads(valid["backbone"].read_text())
    of_vision = {
        "layers": (10**9, True),
        "width": (10**9, 65, "64"),
        "patch_size": (0,),
        "head_width": (0,),
        "mlp_ratio": ("x",),
    }
    of_text = {"vocab_size": (10**12,), "context_length": (-1,), "heads": (7,), "width": (None,), "layers": ([1],)}
    of_all = {
        "embed_dim": (10**9, "x"),
        "quick_gelu": ("false",),
        "vision_cfg": ([],),
        "text_cfg": (None,),
        "other": (1,),
    }
    parts = {"vision_cfg": of_vision, "text_cfg": of_text, None: of_all}
    for part, key, value in (
        (part, key, value) for part, keys in parts.items() for key, values in keys.items() for value in values
    ):
        changed = json.loads(json.dumps(config))
        (changed if part is None else changed[part])[key] = value
        yield write("backbone", json.dumps(changed).encode(), ".json")
    for content in (b"", b"[]", b"{", b"null", b"[" * 100_000, b"\xff"):
        yield write("backbone", content, ".json")
    tensors = load_file(valid["adapters"])
    for metadata in (
        "{",
        "[]",
        '{"trained_on": 3}',
        '{"stages": "x"}',
        '{"quick_gelu": 1}',
        '{"versions": [[]]}',
        "[" * 9999,
    ):
        path = folder / f"{next(numbers)}.safetensors"
        save_file(tensors, path, {"anomalib_aprilgan": metadata})
        yield "adapters", path
    for value in (NAN, INFINITY):
        path = folder / f"{next(numbers)}.safetensors"
        name = next(iter(tensors))
        save_file({**tensors, name: torch.full_like(tensors[name], value)}, path)
        yield "adapters", path
    checkpoint = torch.load(valid["ckpt_path"], weights_only=True)
    content = checkpoint["anomalib_aprilgan"]
    for name in content:
        for value in (None, 3, "x", [], {}, [[1]], {"a": 1}):
            if type(value) is not type(content[name]):
                yield saved("ckpt_path", {**checkpoint, "anomalib_aprilgan": {**content, name: value}}, ".ckpt")
        yield saved(
            "ckpt_path", {**checkpoint, "anomalib_aprilgan": {n: v for n, v in content.items() if n != name}}, ".ckpt"
        )
    for name, tensor in checkpoint["state_dict"].items():
        wrong = [torch.full_like(tensor, NAN)] if tensor.is_floating_point() else []
        for value in (*wrong, torch.zeros(0), torch.zeros(7, 7), "x"):
            yield saved("ckpt_path", {**checkpoint, "state_dict": {**checkpoint["state_dict"], name: value}}, ".ckpt")
    while True:  # as many as are asked for
        kind = draw.choice(sorted(valid))
        yield write(kind, damaged(valid[kind].read_bytes(), draw), valid[kind].suffix)
