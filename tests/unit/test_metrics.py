"""The metrics against recorded figures, scikit-learn and anomalib, and their two forms against each other."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPR, AUPRO
from numpy.typing import NDArray
from scipy.integrate import trapezoid
from skimage.measure import label
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from anomalib_aprilgan.demo.studies import metrics_speed
from anomalib_aprilgan.metrics import METRICS, ChallengeF1Max, PublishedAUPRO, measure
from anomalib_aprilgan.metrics import streaming as streaming_form
from anomalib_aprilgan.metrics.streaming import PROMISED, StreamingMetrics

GOLDEN = Path(__file__).parents[1] / "golden_metrics"
CASES = Path(__file__).parents[1] / "parity" / "golden"
CATEGORIES = ("bottle", "metal_nut", "tile")
RECORDED_NAMES = {
    "auroc_px": "pixel_auroc",
    "f1_px": "pixel_f1_max",
    "ap_px": "pixel_ap",
    "aupro": "aupro",
    "auroc_sp": "image_auroc",
    "f1_sp": "image_f1_max",
    "ap_sp": "image_ap",
}
PIXELS = ("pixel_auroc", "pixel_f1_max", "pixel_ap", "aupro", "aupro_exact", "pixel_aupr")
IMAGES = ("image_auroc", "image_f1_max", "image_ap", "image_aupr")
# A process of its own: the peak of this one would be that of the largest test.
MEMORY = """
import json
import numpy as np
from anomalib_aprilgan.metrics import measure
from anomalib_aprilgan.metrics.streaming import StreamingMetrics
IMAGES, BATCH = 100, 4

def batch(start):
    generator = np.random.default_rng(start)
    masks = np.zeros((BATCH, 518, 518), dtype=bool)
    for mask in masks[:3]:
        for _ in range(2):
            top, left = generator.integers(0, 450, 2)
            height, width = generator.integers(2, 90, 2)
            mask[top : top + height, left : left + width] = True
    maps = generator.random(masks.shape, dtype=np.float32) + np.float32(0.37) * masks  # no threshold at a rate of 0.3
    labels = masks.any(axis=(1, 2))
    return masks, maps, labels, generator.random(BATCH) + 0.5 * labels

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

batch(0)
before = peak()
streaming = StreamingMetrics()
for start in range(0, IMAGES, BATCH):
    streaming.update(*batch(start))
figures = streaming.compute()
grown = peak() - before
whole = [np.concatenate(parts) for parts in zip(*map(batch, range(0, IMAGES, BATCH)))]
exact = measure(*whole)
print(json.dumps({"grown": grown, "streaming": figures, "exact": exact, "shape": whole[1].shape}))
"""

Arrays = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]


def streamed(masks: Any, maps: Any, labels: Any, scores: Any, batch: int = 3) -> dict[str, float]:
    streaming = StreamingMetrics()
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        pixels = [None if array is None else array[part] for array in (masks, maps)]
        streaming.update(*pixels, labels[part], scores[part])
    return streaming.compute()


def fed(masks: Any, maps: Any, labels: Any, scores: Any, batch: int = 3) -> StreamingMetrics:
    streaming = StreamingMetrics()
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        streaming.update(masks[part], maps[part], labels[part], scores[part])
    return streaming


def assert_close(ours: dict[str, float], theirs: dict[str, float], tolerance: float) -> None:
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=tolerance, rel=0, nan_ok=True), name


def blobs(images: int, size: int, seed: int) -> NDArray[np.bool_]:
    """Two rectangles, which may touch or overlap, in three images of four."""
    generator = np.random.default_rng(seed)
    masks = np.zeros((images, size, size), dtype=bool)
    for index in range(images):
        for _ in range(2 if index % 4 else 0):
            top, left = generator.integers(0, size - 3, 2)
            height, width = generator.integers(2, max(size // 4, 3), 2)
            masks[index, top : top + height, left : left + width] = True
    return masks


def drawn(images: int = 8, size: int = 24, levels: int = 30, seed: int = 0) -> Arrays:
    """Maps and scores in [0, 1] with many ties, better than chance."""
    generator = np.random.default_rng(seed)
    masks = blobs(images, size, seed)
    maps = np.floor((0.7 * generator.random(masks.shape) + 0.3 * masks) * levels) / levels
    labels = masks.any(axis=(1, 2))
    scores = np.floor((0.7 * generator.random(images) + 0.3 * labels) * 10) / 10
    return masks, maps.astype(np.float32), labels, scores


@pytest.mark.parametrize("form", [measure, streamed])
class TestRecorded:
    def test_synthetic(self, form: Callable[..., dict[str, float]]) -> None:
        arrays = np.load(GOLDEN / "synthetic.npz")
        recorded = {
            key: value for key, value in json.loads((GOLDEN / "synthetic.json").read_text()).items() if "/sp_" in key
        }
        assert len(recorded) == 10
        for case, expected in recorded.items():
            maps, scores, *without = case.split("/")
            kept = np.arange(8) != 6 if without else np.arange(8)
            figures = form(*(arrays[name][kept] for name in ("gt", maps, "gt_sp", scores)))
            self.compare(figures, expected)
        assert recorded["pr_outlier/sp_a"]["aupro"] is None  # so NaN was among what came out

    def test_fused_scores(self, form: Callable[..., dict[str, float]]) -> None:
        arrays = np.load(GOLDEN / "synthetic.npz")
        figures = form(*(arrays[name] for name in ("gt", "pr_smooth", "gt_sp", "sp_fewshot_final")))
        self.compare(figures, json.loads((GOLDEN / "synthetic.json").read_text())["fewshot_scores"])

    @pytest.mark.parametrize("case", json.loads((GOLDEN / "tiny_cases.json").read_text()))
    def test_tiny_cases(self, form: Callable[..., dict[str, float]], case: str) -> None:
        recorded = json.loads((GOLDEN / "tiny_cases.json").read_text())[case]
        folder = GOLDEN if case == "quickgelu_f1234_k1" else CASES
        arrays = dict(np.load(folder / f"{case}.npz"))
        maps = arrays["map_zero"] if "map_zero" in arrays else np.load(CASES / "quickgelu_f1234_zero.npz")["map_zero"]
        maps = maps + arrays["map_fs"] if "map_fs" in arrays else maps
        masks = np.unpackbits(np.load(CASES / "preprocessed_96.npz")["mask"], axis=-1)
        names = json.loads((CASES / "quickgelu_f1234_zero.json").read_text())["images"]
        labels = np.array(["/good/" not in name for name in names])
        assert set(recorded) == set(CATEGORIES)
        for category, expected in recorded.items():
            chosen = np.array([name.startswith(category) for name in names])
            figures = form(masks[chosen], maps[chosen], labels[chosen], arrays["pr_sp_final"][chosen])
            self.compare(figures, expected)

    def test_bottle_of_an_independent_run(self, form: Callable[..., dict[str, float]]) -> None:
        table = np.loadtxt(GOLDEN / "bottle_4shot_seed42_image_scores.csv", delimiter=",", skiprows=1)
        figures = form(None, None, table[:, 0], table[:, 1])
        assert table.shape == (83, 2)
        # Shortened 0.94365, 0.93443, 0.98307 in the run's report.
        assert figures["image_auroc"] == pytest.approx(0.9436507936507936, abs=1e-9)
        assert figures["image_f1_max"] == pytest.approx(0.9344262295081968, abs=1e-9)
        assert figures["image_ap"] == pytest.approx(0.9830670283355434, abs=1e-9)

    @staticmethod
    def compare(figures: dict[str, float], recorded: dict[str, float | None]) -> None:
        assert set(recorded) == set(RECORDED_NAMES)
        for name, value in recorded.items():
            tolerance = 1e-4 if name == "aupro" else 1e-6
            expected = math.nan if value is None else value
            assert figures[RECORDED_NAMES[name]] == pytest.approx(expected, abs=tolerance, rel=0, nan_ok=True), name
        harmonic = 2 / (1 / figures["pixel_f1_max"] + 1 / figures["image_f1_max"])
        assert figures["challenge_f1_max"] == pytest.approx(harmonic, abs=1e-12)


class TestExact:
    def test_by_hand(self) -> None:
        masks = np.array([[[1, 0, 0], [0, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0], [0, 0, 1]]])
        maps = np.array([[[9, 1, 1], [1, 5, 7], [1, 1, 1]], [[1, 1, 1], [1, 1, 1], [1, 1, 6]]]) / np.float32(8)
        figures = measure(masks, maps, np.array([1, 1, 0])[:2], np.array([0.2, 0.3]))
        # In falling order: 9 found, 7 false, 6 and 5 found; 14 normal ones are equal at the end.
        assert figures["pixel_auroc"] == pytest.approx((1 / 3 * 15 + 2 / 3 * 14) / 15)
        assert figures["pixel_ap"] == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
        assert figures["pixel_f1_max"] == pytest.approx(2 * 3 / (3 + 4))
        # Two regions, since corners join: half of the first, then the second and the other half beyond 1 / 15.
        assert figures["aupro_exact"] == pytest.approx((0.25 / 15 + (0.3 - 1 / 15)) / 0.3)
        assert math.isnan(figures["image_auroc"])

    @pytest.mark.parametrize(("levels", "seed"), [(3, 0), (30, 1), (30, 2), (10**6, 3)])
    def test_scikit_learn(self, levels: int, seed: int) -> None:
        masks, maps, labels, scores = drawn(images=20, levels=levels, seed=seed)
        figures = measure(masks, maps, labels, scores)
        for name, truth, values in (("pixel", masks.ravel(), maps.ravel()), ("image", labels, scores)):
            precision, recall, _ = precision_recall_curve(truth, values)
            f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-30)
            assert figures[f"{name}_auroc"] == pytest.approx(roc_auc_score(truth, values), abs=1e-9)
            assert figures[f"{name}_ap"] == pytest.approx(average_precision_score(truth, values), abs=1e-9)
            assert figures[f"{name}_f1_max"] == pytest.approx(f1.max(), abs=1e-9)

    @pytest.mark.parametrize(("levels", "seed"), [(3, 4), (30, 5), (10**6, 6), (10**6, 7)])
    def test_anomalib(self, levels: int, seed: int) -> None:
        masks, maps, labels, scores = drawn(images=20, levels=levels, seed=seed)
        figures = measure(masks, maps, labels, scores)
        pixels = {"anomaly_map": torch.from_numpy(maps), "gt_mask": torch.from_numpy(masks).int()}
        images = {"pred_score": torch.from_numpy(scores), "gt_label": torch.from_numpy(labels).int()}
        theirs: dict[str, tuple[Any, dict[str, torch.Tensor]]] = {
            "aupro_exact": (AUPRO, pixels),
            "pixel_aupr": (AUPR, pixels),
            "image_aupr": (AUPR, images),
        }
        for name, (metric, batch) in theirs.items():
            judge = metric(fields=list(batch))
            judge.update(SimpleNamespace(**batch))
            assert figures[name] == pytest.approx(judge.compute().item(), abs=1e-6), name

    def test_maps_of_other_kinds(self, tmp_path: Path) -> None:
        masks, maps, labels, scores = drawn()
        expected = measure(masks, maps, labels, scores)
        on_disk = np.memmap(tmp_path / "maps", dtype=np.float32, mode="w+", shape=maps.shape)
        on_disk[:] = maps
        tensors = [torch.from_numpy(array) for array in (masks, maps, labels, scores)]
        for form in (measure, streamed):
            assert_close(form(*tensors), expected, 1e-12)
            assert_close(form(masks, on_disk, labels, scores), expected, 1e-12)
            others = masks.astype(np.uint8), maps.astype(np.float64), labels.astype(float), scores
            assert_close(form(*others), expected, 1e-12)
        assert np.array_equal(on_disk, maps)

    def test_arguments_are_left_alone(self) -> None:
        arrays = drawn()
        copies = [array.copy() for array in arrays]
        measure(*arrays)
        streamed(*arrays)
        assert all(np.array_equal(array, copy) for array, copy in zip(arrays, copies, strict=True))


@pytest.mark.parametrize("form", [measure, streamed])
class TestLaws:
    @pytest.mark.parametrize("seed", range(3))
    def test_any_rising_transform_changes_published_pro_alone(
        self, form: Callable[..., dict[str, float]], seed: int
    ) -> None:
        masks, maps, labels, scores = drawn(levels=200, seed=seed)
        generator = np.random.default_rng(seed)
        # Every distinct value goes to a random one, in order; some are negative.
        values, places = np.unique(maps, return_inverse=True)
        other = np.unique((generator.standard_normal(2 * values.size) ** 3).astype(np.float32))[: values.size]
        before = form(masks, maps, labels, scores)
        after = form(masks, other[places].reshape(maps.shape), labels, np.exp(5 * scores) - 7)
        assert after["aupro"] != before["aupro"]
        assert_close(after | {"aupro": 0.0}, before | {"aupro": 0.0}, 1e-12)

    def test_order_of_images_does_not_matter(self, form: Callable[..., dict[str, float]]) -> None:
        arrays = drawn(images=12)
        shuffled = np.random.default_rng(0).permutation(12)
        assert_close(form(*(array[shuffled] for array in arrays)), form(*arrays), 1e-12)

    def test_both_zeros_are_equal(self, form: Callable[..., dict[str, float]]) -> None:
        masks, maps, labels, scores = drawn(levels=5)
        signed = np.where((maps == 0) & (np.random.default_rng(0).random(maps.shape) < 0.5), np.float32(-0.0), maps)
        assert np.signbit(signed).any()
        assert form(masks, signed, labels, scores) == form(masks, maps, labels, scores)

    def test_perfect_maps(self, form: Callable[..., dict[str, float]]) -> None:
        masks, _, labels, _ = drawn()
        figures = form(masks, masks.astype(np.float32), labels, labels.astype(float))
        assert math.isnan(figures.pop("aupro"))  # no false positive at any threshold: nothing to stretch
        assert figures == pytest.approx(dict.fromkeys(figures, 1.0))

    def test_constant_maps(self, form: Callable[..., dict[str, float]]) -> None:
        masks, maps, labels, scores = drawn()
        share = masks.mean()
        figures = form(masks, np.full_like(maps, 0.3), labels, scores)
        assert math.isnan(figures["aupro"])
        assert figures["pixel_auroc"] == pytest.approx(0.5)
        assert figures["pixel_ap"] == pytest.approx(share)
        assert figures["pixel_f1_max"] == pytest.approx(2 * share / (1 + share))
        assert figures["aupro_exact"] == pytest.approx(0.15)  # as a random one

    def test_what_does_not_exist_is_nan(self, form: Callable[..., dict[str, float]]) -> None:
        masks, maps, labels, scores = drawn()
        for pixels in ((None, None), (None, maps), (masks, None), (0 * masks, maps), (masks | True, maps)):
            figures = form(*pixels, labels, scores)
            assert tuple(figures) == METRICS
            assert {name for name in figures if math.isnan(figures[name])} == {*PIXELS, "challenge_f1_max"}
            assert figures["image_auroc"] == pytest.approx(roc_auc_score(labels, scores))
        for same in (0 * labels, labels | True):
            figures = form(masks, maps, same, scores)
            assert {name for name in figures if math.isnan(figures[name])} == {*IMAGES, "challenge_f1_max"}
        assert all(math.isnan(value) for value in measure(masks[:0], maps[:0], labels[:0], scores[:0]).values())

    def test_extreme_ranges(self, form: Callable[..., dict[str, float]]) -> None:
        masks, maps, labels, scores = drawn()
        ordinary = form(masks, maps, labels, scores)
        smallest, largest = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
        for other in ((maps * 30).round() * smallest, (2 * maps - 1) * largest):
            figures = form(masks, other.astype(np.float32), labels, scores)
            assert math.isnan(figures["aupro"])  # no step of thresholds in single precision
            assert figures["pixel_auroc"] == pytest.approx(ordinary["pixel_auroc"])


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], NDArray[np.float32]]] = {
    "uniform": lambda generator, shape: generator.random(shape, dtype=np.float32),
    "gaussian": lambda generator, shape: generator.standard_normal(shape, dtype=np.float32),
    "peaked": lambda generator, shape: generator.standard_exponential(shape, dtype=np.float32) ** 4 / 100,
    "near 4": lambda generator, shape: 4 - 0.01 * generator.random(shape, dtype=np.float32) ** 2,
    "negative": lambda generator, shape: -1000 - 3 * generator.random(shape, dtype=np.float32),
    "heaps at both ends": lambda generator, shape: np.clip(
        generator.standard_normal(shape, dtype=np.float32) / 3 + 0.5, 0, 0.9
    ),
    "wide, and a narrow heap": lambda generator, shape: np.where(
        np.arange(shape[-1]) % 2,
        np.exp(5 * generator.standard_normal(shape, dtype=np.float32)).clip(0, 4),
        3.9 + 1e-3 * generator.standard_normal(shape, dtype=np.float32),
    ),
}


class TestStreaming:
    @pytest.mark.parametrize("distribution", DISTRIBUTIONS)
    def test_agrees_with_the_exact_form(self, distribution: str, monkeypatch: pytest.MonkeyPatch) -> None:
        # An eighth of the room for a tenth of the pixels of the test below.
        monkeypatch.setattr(streaming_form, "MOST_BINS", streaming_form.MOST_BINS // 8)
        monkeypatch.setattr(streaming_form, "PIXELS_AT_ONCE", streaming_form.PIXELS_AT_ONCE // 4)
        masks = blobs(20, 518, seed=1)
        maps = DISTRIBUTIONS[distribution](np.random.default_rng(2), masks.shape)
        if distribution == "peaked":
            maps *= 1 + 2 * masks.astype(np.float32)
        else:
            maps = maps + masks * np.float32(0.37) * np.abs(maps - np.median(maps)).mean()
        maps = maps.clip(None, 0.9) if distribution == "heaps at both ends" else maps
        assert maps.dtype == np.float32
        labels = masks.any(axis=(1, 2))
        scores = maps.mean(axis=(1, 2))
        exact = measure(masks, maps, labels, scores)
        assert 0.5 < exact["pixel_auroc"] < 0.99
        assert_close(streamed(masks, maps, labels, scores), exact, 1e-4)

    @pytest.mark.slow
    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
    def test_many_maps_in_bounded_memory(self) -> None:
        command = [sys.executable, "-c", MEMORY]
        run = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
        assert run.returncode == 0, run.stderr
        result = json.loads(run.stdout)
        assert result["shape"] == [100, 518, 518]
        assert 20e6 < result["grown"] < 500e6
        assert set(result["exact"]) == set(METRICS)
        assert_close(result["streaming"], result["exact"], 1e-4)
        assert result["streaming"]["pixel_ap"] != result["exact"]["pixel_ap"]  # scores were counted together

    @pytest.mark.parametrize("logits", [(-6, 8, 18), (-6, 2, 6), (0, 1, 1)])
    def test_logits_that_saturate(self, logits: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch) -> None:
        """Softmax maps of wide logits have most of their anomalous pixels a hair below 1."""
        monkeypatch.setattr(streaming_form, "MOST_BINS", streaming_form.MOST_BINS // 4)
        monkeypatch.setattr(streaming_form, "PIXELS_AT_ONCE", streaming_form.PIXELS_AT_ONCE // 8)
        mean, deviation, shift = logits
        masks = blobs(12, 518, seed=1)
        drawn_logits = np.random.default_rng(0).normal(mean, deviation, masks.shape) + shift * masks
        maps = (1 / (1 + np.exp(-drawn_logits))).astype(np.float32)
        labels, scores = masks.any(axis=(1, 2)), maps.mean(axis=(1, 2))
        streaming = fed(masks, maps, labels, scores)
        bounds = streaming.bounds()
        assert 0 < max(bounds.values()) < PROMISED
        assert_close(streaming.compute(), measure(masks, maps, labels, scores), 1e-4)

    def test_bounds_hold(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """200 trials with far too few bins, so that figures are off."""
        off, doubtful = 0.0, 0
        for trial in range(200):
            generator = np.random.default_rng(trial)
            monkeypatch.setattr(streaming_form, "MOST_BINS", int(generator.integers(8, 800)))
            monkeypatch.setattr(streaming_form, "PIXELS_AT_ONCE", int(generator.integers(100, 4000)))
            masks = blobs(8, 32, seed=trial)
            kind = list(DISTRIBUTIONS)[trial % len(DISTRIBUTIONS)]
            maps = DISTRIBUTIONS[kind](generator, masks.shape).astype(np.float32)
            maps += masks * np.float32(generator.random()) * np.abs(maps - np.median(maps)).mean()
            labels, scores = masks.any(axis=(1, 2)), generator.random(8)
            streaming = fed(masks, maps, labels, scores)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                figures = streaming.compute()
            exact, bounds = measure(masks, maps, labels, scores), streaming.bounds()
            for name, bound in bounds.items():
                assert abs(figures[name] - exact[name]) <= bound + 1e-12, (trial, name)
                off, doubtful = max(off, abs(figures[name] - exact[name])), doubtful + (bound > 0)
        assert off > 0.01
        assert doubtful > 500

    def test_says_what_may_be_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        arrays = drawn(levels=10**6)
        streaming = fed(*arrays)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            streaming.compute()
        assert set(streaming.bounds().values()) == {0.0}
        monkeypatch.setattr(streaming_form, "MOST_BINS", 50)
        with pytest.warns(UserWarning, match=r"may be off by more than 0.0001: .*pixel_ap ± .*Take the exact ones"):
            fed(*arrays).compute()

    def test_thresholds_go_from_the_lowest_to_the_highest_score(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also where both lie in bins with others, whose edges are elsewhere."""
        monkeypatch.setattr(streaming_form, "MOST_BINS", 60)
        monkeypatch.setattr(streaming_form, "PIXELS_AT_ONCE", 500)
        masks, maps, labels, scores = drawn(levels=10**6)
        maps = maps + np.float32(0.3)
        streaming = fed(masks, maps, labels, scores)
        bins = streaming._bins()
        assert bins is not None
        ends = maps.min(), maps.max()
        assert bins.values[0] < ends[0]
        assert bins.values[-1] < ends[1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = streaming.compute()["aupro"]
        # As by the protocol, each pixel at the edge of its bin, thresholds between the scores themselves.
        at_edges = bins.values[np.searchsorted(bins.values, maps, side="right") - 1]
        rates, overlap = [], []
        regions = [label(mask, connectivity=2) for mask in masks]
        for threshold in np.arange(ends[0], ends[1], (ends[1] - ends[0]) / np.float32(200), dtype=np.float64):
            above = at_edges > threshold
            rates.append(above[~masks].mean())
            overlap.append(
                np.mean([above[i][of == n].mean() for i, of in enumerate(regions) for n in range(1, of.max() + 1)])
            )
        x, y = np.array(rates), np.array(overlap)
        x, y = x[x < 0.3], y[x < 0.3]
        assert found == pytest.approx(-trapezoid(y, (x - x.min()) / (x.max() - x.min())), abs=1e-9)

    def test_gathered_from_two_processes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As torchmetrics does it: states of all processes one after the other."""
        monkeypatch.setattr(streaming_form, "MOST_BINS", 3000)
        monkeypatch.setattr(streaming_form, "PIXELS_AT_ONCE", 2000)
        masks = blobs(12, 48, seed=3)
        maps = np.random.default_rng(3).standard_normal(masks.shape).astype(np.float32) + masks
        labels, scores = masks.any(axis=(1, 2)), maps.mean(axis=(1, 2))
        halves = [fed(*(array[part] for array in (masks, maps, labels, scores))) for part in (np.s_[:5], np.s_[5:])]
        first, second = halves
        first.merge_state(second)
        exact, bounds = measure(masks, maps, labels, scores), first.bounds()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            figures = first.compute()
        assert 0 < bounds["pixel_ap"] < 0.01
        for name, bound in bounds.items():
            assert abs(figures[name] - exact[name]) <= bound + 1e-12, name
        assert figures["image_auroc"] == pytest.approx(exact["image_auroc"])

    def test_maps_of_many_sizes(self) -> None:
        masks, maps, labels, scores = drawn()
        wide = np.pad(masks[:3], ((0, 0), (2, 3), (0, 9))), np.pad(maps[:3], ((0, 0), (2, 3), (0, 9)), mode="reflect")
        many = [*wide[0], *masks[3:]], [*wide[1], *maps[3:]]
        exact = measure(*many, labels, scores)
        assert exact["pixel_auroc"] != measure(masks, maps, labels, scores)["pixel_auroc"]
        assert exact["pixel_auroc"] == pytest.approx(
            roc_auc_score(*(np.concatenate([np.ravel(one) for one in arrays]) for arrays in many))
        )
        assert_close(streamed(*many, labels, scores), exact, 1e-12)

    def test_reset_begins_anew(self) -> None:
        streaming = fed(*drawn(seed=1))
        streaming.reset()
        streaming.update(*drawn(seed=2))
        assert_close(streaming.compute(), measure(*drawn(seed=2)), 1e-12)

    def test_batches_do_not_matter_and_figures_can_be_asked_for_at_any_time(self) -> None:
        arrays = drawn(images=10, levels=10**6)
        expected = measure(*arrays)
        streaming = StreamingMetrics()
        for index in range(10):
            streaming.update(*(array[index : index + 1] for array in arrays))
            assert_close(streaming.compute(), measure(*(array[: index + 1] for array in arrays)), 1e-12)
        assert_close(streamed(*arrays, batch=4), expected, 1e-12)
        assert_close(streamed(*arrays, batch=100), expected, 1e-12)

    def test_a_bad_batch_is_not_counted(self) -> None:
        masks, maps, labels, scores = drawn()
        streaming = StreamingMetrics()
        streaming.update(masks, maps, labels, scores)
        broken = maps.copy()
        broken[-1, 3, 3] = np.nan
        with pytest.raises(ValueError, match="`maps` must be finite"):
            streaming.update(masks, broken, labels, scores)
        with pytest.raises(ValueError, match="`masks` and `maps` must come with every batch or with none"):
            streaming.update(None, None, labels, scores)
        assert_close(streaming.compute(), measure(masks, maps, labels, scores), 1e-12)

    @pytest.mark.filterwarnings("ignore:The ``compute`` method")  # torchmetrics' own words for it
    def test_needs_a_batch(self) -> None:
        with pytest.raises(RuntimeError, match=r"call `StreamingMetrics.update` first"):
            StreamingMetrics().compute()

    def test_what_it_was_given_may_change_afterwards(self) -> None:
        arrays = drawn()
        expected = measure(*arrays)
        streaming = StreamingMetrics()
        given = [array.copy() for array in arrays]
        streaming.update(*given)
        for array in given:
            array[:] = 0
        assert_close(streaming.compute(), expected, 1e-12)


@pytest.mark.parametrize("form", [measure, streamed])
def test_a_false_positive_rate_of_exactly_the_limit_is_left_out(form: Callable[..., dict[str, float]]) -> None:
    """The authors keep rates below 0.3: of ten normal pixels, three above a threshold are too many."""
    masks, maps = np.zeros((1, 1, 14), dtype=bool), np.zeros((1, 1, 14), dtype=np.float32)
    masks[0, 0, 10:] = True
    maps[0, 0] = [*range(10), 2.5, 6.5, 7.5, 9.5]
    thresholds = np.arange(0, 9.5, 9.5 / 200)
    rates = np.array([(maps[~masks] > threshold).mean() for threshold in thresholds])
    overlap = np.array([(maps[masks] > threshold).mean() for threshold in thresholds])
    assert (rates == 0.3).any()  # 7, 8 and 9
    areas = {}
    for name, kept in (("below", rates < 0.3), ("at", rates <= 0.3)):
        x, y = rates[kept] / rates[kept].max(), overlap[kept]
        areas[name] = -float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2)
    assert abs(areas["below"] - areas["at"]) > 0.01
    figures = form(masks, maps, np.array([1]), np.array([0.5]))
    assert figures["aupro"] == pytest.approx(areas["below"])


class TestInAnEvaluator:
    def batches(self) -> tuple[Arrays, list[Any]]:
        masks, maps, labels, scores = arrays = drawn(images=9)
        fields = (("gt_mask", masks), ("anomaly_map", maps), ("gt_label", labels), ("pred_score", scores))
        batches = [
            ImageBatch(
                image=torch.zeros(3, 3, 24, 24),
                **{name: torch.from_numpy(of[start : start + 3]) for name, of in fields},
            )
            for start in (0, 3, 6)
        ]
        return arrays, batches

    def test_are_the_figures_of_all_batches(self) -> None:
        arrays, batches = self.batches()
        expected = measure(*arrays)
        for kind, name in ((PublishedAUPRO, "aupro"), (ChallengeF1Max, "challenge_f1_max")):
            metric = kind()
            for batch in batches:
                metric.update(batch)
            assert metric.compute() == pytest.approx(expected[name], abs=1e-6)
            assert kind(prefix="pixel_").name == f"pixel_{kind.__name__}"


@pytest.mark.parametrize("form", [measure, streamed])
class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"masks": np.zeros((8, 24, 23))}, r"`masks` must have the shape of `maps`, got `masks` \(8, 24, 23\) and"),
            ({"masks": np.zeros((8, 1, 24, 24))}, r"`masks` must be \(N, H, W\) .* got shape \(8, 1, 24, 24\): drop"),
            ({"maps": np.zeros((8, 0, 24))}, r"`maps` must be \(N, H, W\)"),
            ({"labels": np.zeros((8, 1))}, r"`labels` must have one value for each .* got `labels` \(8, 1\)"),
            ({"scores": np.zeros(7)}, r"`scores` must have one value for each .* `scores` \(7,\)"),
            ({"scores": np.array([0.0] * 7 + [np.nan])}, r"`scores` must be finite numbers, got nan: leave"),
            ({"labels": np.arange(8)}, r"`labels` must hold 0 and 1 alone, got 2: pass 1 for an anomalous image"),
            ({"masks": np.full((8, 24, 24), 255)}, r"`masks` must hold 0 and 1 alone, got 255: in image 0, divide by"),
            ({"masks": np.full((8, 24, 24), np.nan)}, r"`masks` must hold 0 and 1 alone, got nan"),
            ({"maps": np.full((8, 24, 24), np.inf)}, r"`maps` must be finite numbers, got inf: look at image 0"),
            ({"maps": np.full((8, 24, 24), -1e300)}, r"`maps` must be finite numbers, got -inf"),
        ],
    )
    def test_says_what_is_wrong(
        self, form: Callable[..., dict[str, float]], changes: dict[str, Any], message: str
    ) -> None:
        arrays = dict(zip(("masks", "maps", "labels", "scores"), drawn(), strict=True)) | changes
        keywords = {} if form is measure else {"batch": 8}
        with pytest.raises(ValueError, match=message):
            form(**arrays, **keywords)


class TestSpeed:
    def test_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        metrics_speed.main(["--images", "12", "--size", "96"])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("12 maps of 96 px")
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")][1:]
        assert [row[:2] for row in rows] == [
            ["scikit-learn and scikit-image", "7"],
            ["exact", "11"],
            ["streaming", "11"],
        ]
        assert float(rows[1][3]) < 0.25

    def test_results_that_differ_are_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong(*arrays: Any) -> dict[str, float]:
            return measure(*arrays) | {"pixel_ap": 0.5}

        monkeypatch.setattr(metrics_speed, "measure", wrong)
        with pytest.raises(RuntimeError, match=r"`pixel_ap` should be .* but its exact form gives 0\.5"):
            metrics_speed.main(["--images", "4", "--size", "32"])

    def test_scikit_learn_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
        with pytest.raises(ImportError, match=r"needs scikit-learn, which is missing: pip install"):
            metrics_speed.main(["--images", "4", "--size", "32"])
