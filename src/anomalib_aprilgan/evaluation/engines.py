"""How fast each run time is with a CLIP: torch, ONNX Runtime, OpenVINO, side by side.

Weights are random: they change no time. All engines take the same images in turn, round by round, since the speed of a
machine drifts. The peak of memory is that of a process of its own, which loads a file and runs one batch.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from anomalib.deploy import CompressionType
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from ..clip import library
from ..clip.architecture import ClipArchitecture
from ..demo.drawn_clip.trainer import random_weights
from ..lightning_model import AprilGAN
from ..runtime.openvino_core import compiled
from ..timing import measure

ENGINES = (
    "torch", "torch-bf16", "torch-fp16", "torch-compile", "onnxruntime", "openvino", "openvino-fp16", "openvino-int8",
)  # fmt: skip
_COMPRESSED = {"openvino-fp16": CompressionType.FP16, "openvino-int8": CompressionType.INT8_PTQ}
_DTYPES = {"torch-bf16": torch.bfloat16, "torch-fp16": torch.float16}
_REFERENCES = 4
# Run by a process that loads nothing else; prints the peak in kB.
_OF_ITS_OWN = """
import sys
import numpy as np
file, shape = sys.argv[1], [int(side) for side in sys.argv[2:]]
images = np.zeros(shape, dtype=np.float32)
if file.endswith(".onnx"):
    import onnxruntime
    onnxruntime.InferenceSession(file).run(None, {"input": images})
else:
    import openvino
    openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""
Run = Callable[[NDArray[np.float32]], object]


@dataclass(frozen=True)
class Measured:
    """What was measured of an engine with batches of one size.

    Attributes:
        engine: One of ``ENGINES``.
        batch_size: Images of a batch.
        p50: Median seconds of a batch.
        p95: Seconds that 95 in 100 batches take at most.
        throughput: Images a second; several batches at a time where the engine can.
        ratio: Median over the rounds of the seconds, to those of the first engine.
        megabytes: Peak of memory of a process that runs one batch; ``None`` where it runs in this one.
        roofline: Share of the speed of matrix products of this device that the vision tower reaches, in torch.
    """

    engine: str
    batch_size: int
    p50: float
    p95: float
    throughput: float
    ratio: float
    megabytes: float | None
    roofline: float | None


def measure_engines(
    backbone: str,
    image_size: int | None,
    k_shot: int,
    engines: Sequence[str],
    batch_sizes: Sequence[int],
    rounds: int,
    device: str = "cpu",
) -> list[Measured]:
    """Measure engines, the first of which others are compared with; see ``Measured``."""
    architecture = ClipArchitecture.load(backbone, None if image_size is None else (image_size, image_size), None)
    found = []
    with TemporaryDirectory() as folder:
        model = _model(architecture, k_shot, Path(folder)).to(device)
        files = {name: _file_of(model, name, Path(folder)) for name in engines}
        runs = {name: _runner(model, name, files[name]) for name in engines}
        flops = library.vision_flops(architecture.name, architecture.config, architecture.image_size)
        rates = {name: _matmul_rate(device, _DTYPES.get(name, torch.float32)) for name in engines if _is_torch(name)}
        for size in batch_sizes:
            images = np.random.default_rng(0).random((size, 3, *architecture.image_size), dtype=np.float32)
            seconds = measure({name: partial(run, images) for name, run in runs.items()}, rounds)
            first = seconds[engines[0]]
            for name in engines:
                own, file = seconds[name], files[name]
                p50 = statistics.median(own)
                throughput = size / p50 if file is None else _throughput(file, images) or size / p50
                found.append(
                    Measured(
                        name,
                        size,
                        p50,
                        float(np.quantile(own, 0.95)),
                        throughput,
                        statistics.median(mine / other for mine, other in zip(own, first, strict=True)),
                        None if file is None else _peak(file, images.shape),
                        flops * size / p50 / rates[name] if name in rates else None,
                    )
                )
    return found


def _is_torch(name: str) -> bool:
    return name.startswith("torch")


def _model(architecture: ClipArchitecture, k_shot: int, folder: Path) -> AprilGAN:
    """A model with random weights and references of noise."""
    weights = folder / "clip.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in random_weights(architecture, seed=0).items()}, weights)
    good = folder / "good"
    good.mkdir()
    rng = np.random.default_rng(0)
    for number in range(max(k_shot, _REFERENCES)):
        noise = rng.integers(0, 256, (*architecture.image_size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(good / f"{number}.png")
    model = AprilGAN(
        architecture.name,
        str(weights),
        image_size=architecture.image_size,
        adapters=None,
        class_name="object",
        k_shot=k_shot,
        references=str(good) if k_shot else None,
        export_options={"images": str(good)},
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The adapters are untrained")
        model.setup("predict")
    return model.eval()


def _file_of(model: AprilGAN, name: str, folder: Path) -> Path | None:
    """What an engine runs; ``None`` for torch."""
    if _is_torch(name):
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The adapters are untrained")
        if name == "onnxruntime":
            return model.to_onnx(folder)
        return model.to_openvino(folder, name, compression_type=_COMPRESSED.get(name))


def _runner(model: AprilGAN, name: str, file: Path | None) -> Run:
    if file is not None:
        return _load(file)
    network = model if name != "torch-compile" else torch.compile(model.predict)

    @torch.inference_mode()
    def run(images: NDArray[np.float32]) -> None:
        on_device = torch.from_numpy(images).to(model.device)
        with torch.autocast(model.device.type, _DTYPES.get(name), enabled=name in _DTYPES):
            network(on_device)
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def _load(file: Path) -> Run:
    if file.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(file)
        return lambda images: session.run(None, {"input": images})
    run: Run = compiled(file)
    return run


def _throughput(file: Path, images: NDArray[np.float32]) -> float | None:
    """Images a second with several requests at a time, in OpenVINO."""
    if file.suffix != ".xml":
        return None
    import openvino

    queue: Any = openvino.AsyncInferQueue(compiled(file, config={"PERFORMANCE_HINT": "THROUGHPUT"}))
    queue.start_async(images)
    queue.wait_all()
    number = 2 * len(queue)
    start = time.perf_counter()
    for _ in range(number):
        queue.start_async(images)
    queue.wait_all()
    return number * len(images) / (time.perf_counter() - start)


def _peak(file: Path, shape: Sequence[int]) -> float | None:
    """Peak of memory in megabytes of a process that runs one batch, where the system tells it."""
    if not Path("/proc/self/status").exists():
        return None
    command = [sys.executable, "-c", _OF_ITS_OWN, str(file), *map(str, shape)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603  # this file's own code
    return float(found.stdout) / 1e3


def _matmul_rate(device: str, dtype: torch.dtype, side: int = 2048) -> float:
    """Floating-point operations a second of large matrix products."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        left @ right
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2.0 * side**3 / best
