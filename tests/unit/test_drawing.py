"""The drawing of products and defects: the same everywhere, exact masks, one look per product."""

import hashlib
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from anomalib_aprilgan.demo import drawing
from anomalib_aprilgan.demo.drawing import CATEGORIES, DEFECTS, OBJECTS, TEXTURES, contact_sheet, draw_good, draw_twins
from anomalib_aprilgan.demo.drawing.canvas import Canvas, Pose
from anomalib_aprilgan.demo.drawing.catalogue import INVENTED_TEXTURE_DRAWERS
from anomalib_aprilgan.demo.drawing.draws import Draws
from anomalib_aprilgan.demo.drawing.noise import TABLE, cells, lattice, table
from anomalib_aprilgan.demo.drawing.scene import draw_scene

SURFACE = ("contamination", "crack", "dent", "discolouration", "fibre", "hairline", "hole", "scratch", "stain")

# The first 16 hex digits of the SHA-256 of good and bad picture; a change of the drawing that
# changes them must raise DRAWING_VERSION in drawing/folder.py.
PINNED = {
    ("bearing", "bent"): "445f77d372d37be2",
    ("bottle_cap", "blur"): "9a17f6821b38a706",
    ("brick", "contamination"): "f9422a83da68a939",
    ("brushed_metal", "crack"): "dfc93a2d3d6eada7",
    ("button", "dent"): "5f7b3e52f3d231ad",
    ("cable", "discolouration"): "1d3c721719092a2f",
    ("capsule", "fibre"): "c0ad4b5d0414358d",
    ("carpet", "hairline"): "c448f0e894ec6a7b",
    ("chip", "hole"): "45c0a16ac0a7c1a9",
    ("connector", "misaligned"): "23186e4987314a88",
    ("cookie", "missing_piece"): "d1e69864c19f0f25",
    ("fabric", "rotated_patch"): "56a5ba586f50a6ce",
    ("gear", "scratch"): "dbaebb2a8553103b",
    ("grid", "stain"): "2efa1c1c3f4aa96a",
    ("leather", "bent"): "5f65a62caf2fb812",
    ("marble", "blur"): "a092e5b0744bfbad",
    ("nut", "contamination"): "e792441a4c761dd8",
    ("pill", "crack"): "d28a65fef749b127",
    ("screw", "dent"): "1319971149f132e3",
    ("terrazzo", "discolouration"): "888529cc7ad76e6f",
    ("tile", "fibre"): "445de4fd678e28e3",
    ("washer", "hairline"): "22b9a03e6a1e23d1",
    ("wood", "hole"): "e0408aeee029bc1b",
    ("zipper", "misaligned"): "20663bffe9725bd2",
}
# Of sixty products each: what the built-in CLIP was trained on, and its training could not be repeated without.
PINNED_INVENTIONS = {"invented_object_0": "a8aaded153c5ba4e", "invented_texture_0": "1366fde7764a7822"}


def digest(category: str, kind: str) -> str:
    twins = draw_twins(category, 0, 3, kind, 64)
    return hashlib.sha256(twins.good.tobytes() + twins.bad.tobytes()).hexdigest()[:16]


def mean_colours(category: str, keys: list[tuple[int, int]], *, random_style: bool = False) -> np.ndarray:
    """``(N, 3)`` mean colour in the middle of the pictures of (seed, index)."""
    pictures = [draw_good(category, seed, index, 32, random_style=random_style) for seed, index in keys]
    return np.stack([picture[8:24, 8:24].mean(axis=(0, 1)) for picture in pictures])


def spread(colours: np.ndarray) -> float:
    return float(np.median(np.linalg.norm(colours[:, None] - colours[None], axis=2)[np.triu_indices(len(colours), 1)]))


class TestSet:
    def test_names(self) -> None:
        assert len(TEXTURES) == 10
        assert len(OBJECTS) == 14
        assert sorted(TEXTURES + OBJECTS) == list(CATEGORIES)
        assert len(DEFECTS) == 14
        assert set(SURFACE) < set(DEFECTS)


class TestSameEverywhere:
    @pytest.mark.parametrize(("category", "kind"), PINNED)
    def test_pinned_bytes(self, category: str, kind: str) -> None:
        assert digest(category, kind) == PINNED[category, kind]

    @pytest.mark.parametrize("name", PINNED_INVENTIONS)
    def test_pinned_inventions(self, name: str) -> None:
        joined = hashlib.sha256(b"".join(draw_good(name, seed, 0, 48).tobytes() for seed in range(60)))
        assert joined.hexdigest()[:16] == PINNED_INVENTIONS[name]

    def test_fresh_process_without_torch(self) -> None:
        """Other hash seed, one thread, the drawing alone: same bytes, and torch is not needed."""
        code = (
            "import sys, types, hashlib\n"
            "for name, folder in (('anomalib_aprilgan', ''), ('anomalib_aprilgan.demo', '/demo')):\n"
            "    sys.modules[name] = types.ModuleType(name); sys.modules[name].__path__ = [sys.argv[1] + folder]\n"
            "from anomalib_aprilgan.demo.drawing import draw_twins\n"
            "assert 'torch' not in sys.modules and 'cv2' not in sys.modules\n"
            "twins = draw_twins('gear', 0, 3, 'crack', 64)\n"
            "print(hashlib.sha256(twins.good.tobytes() + twins.bad.tobytes()).hexdigest()[:16])\n"
        )
        folder = Path(drawing.__file__).parents[2]
        result = subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            env={"PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.strip() == digest("gear", "crack")

    def test_each_picture_on_its_own(self) -> None:
        alone = draw_good("cookie", 4, 9, 48)
        for index in range(3):
            draw_good("cookie", 4, index, 48)
        np.testing.assert_array_equal(draw_good("cookie", 4, 9, 48), alone)
        assert (draw_good("cookie", 4, 8, 48) != alone).mean() > 0.5

    def test_draws_are_the_top_53_bits_of_pcg64(self) -> None:
        raw = np.random.PCG64(np.random.SeedSequence([5, 0x352441C2])).random_raw(4)  # CRC-32 of "abc"
        np.testing.assert_array_equal(Draws(5, "abc").array(4), (raw >> np.uint64(11)) * 2.0**-53)


class TestTwins:
    @pytest.mark.parametrize("kind", DEFECTS)
    @pytest.mark.parametrize("category", CATEGORIES)
    def test_mask_is_the_difference(self, category: str, kind: str) -> None:
        twins = draw_twins(category, 1, 5, kind, 64)
        np.testing.assert_array_equal(twins.good, draw_good(category, 1, 5, 64))
        np.testing.assert_array_equal(twins.mask, (twins.good != twins.bad).any(axis=2))
        assert 8 <= twins.mask.sum() <= 64 * 64 / 3
        change = np.abs(twins.good.astype(int) - twins.bad.astype(int)).max(axis=2)[twins.mask]
        assert change.min() >= 3
        assert 6 <= change.mean() <= 190

    @pytest.mark.parametrize("category", OBJECTS)
    @pytest.mark.parametrize("kind", SURFACE)
    def test_surface_defects_lie_on_the_object(self, category: str, kind: str) -> None:
        cover = draw_scene(category, 2, 7, 64, random_style=False).planes[3]
        mask = draw_twins(category, 2, 7, kind, 64).mask
        assert cover[mask].min() > 0
        assert 0.05 < (cover > 0.5).mean() < 0.75

    def test_missing_piece_shows_the_ground(self) -> None:
        """What is gone from a dark chip on a light ground is lighter than the chip was."""
        scene = draw_scene("chip", 0, 5, 96, random_style=False)
        assert scene.background is not None
        assert scene.background.mean() > 0.5
        twins = draw_twins("chip", 0, 5, "missing_piece", 96)
        gained = twins.bad.astype(float).mean(axis=2) - twins.good.astype(float).mean(axis=2)
        assert gained[twins.mask].mean() > 20

    @pytest.mark.parametrize("kind", ["hairline", "discolouration"])
    def test_subtle_kinds_are_fainter(self, kind: str) -> None:
        def strength(name: str) -> float:
            values = []
            for category in CATEGORIES:
                twins = draw_twins(category, 3, 2, name, 64)
                values.append(np.abs(twins.good.astype(int) - twins.bad.astype(int)).max(axis=2)[twins.mask].mean())
            return float(np.median(values))

        assert strength(kind) < 0.6 * strength("crack")

    def test_defects_vary(self) -> None:
        masks = [draw_twins("tile", 0, index, "stain", 64).mask for index in range(12)]
        areas = np.array([mask.sum() for mask in masks])
        centres = np.array([np.argwhere(mask).mean(axis=0) for mask in masks])
        assert areas.max() > 2 * areas.min()
        assert (centres.std(axis=0) > 8).all()

    @pytest.mark.parametrize("size", [32, 33, 250, 1024])
    def test_least_area_at_every_size(self, size: int) -> None:
        for kind in ("hairline", "blur", "contamination"):
            twins = draw_twins("brushed_metal", 0, 5, kind, size)
            assert twins.bad.shape == (size, size, 3)
            assert twins.bad.dtype == np.uint8
            assert max(8, 0.001 * size**2) <= twins.mask.sum() <= size**2 / 3


class TestProduct:
    @pytest.mark.parametrize("category", CATEGORIES)
    def test_one_look_per_seed(self, category: str) -> None:
        within = np.mean([spread(mean_colours(category, [(seed, index) for index in range(5)])) for seed in range(4)])
        between = spread(mean_colours(category, [(seed, 0) for seed in range(12)]))
        random = spread(mean_colours(category, [(0, index) for index in range(12)], random_style=True))
        assert between > 1.5 * within
        assert random > 1.5 * within

    @pytest.mark.parametrize("category", OBJECTS)
    def test_pose_varies(self, category: str) -> None:
        covers = [draw_scene(category, 0, index, 32, random_style=False).planes[3] for index in range(6)]
        assert min(float(np.abs(first - second).mean()) for first, second in pairwise(covers)) > 0.005

    @pytest.mark.parametrize("category", CATEGORIES)
    def test_look_scales_with_size(self, category: str) -> None:
        """Small and large picture agree once both are shrunk to 32 pixels."""
        small = draw_good(category, 0, 1, 64).astype(float).reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
        large = draw_good(category, 0, 1, 256).astype(float).reshape(32, 8, 32, 8, 3).mean(axis=(1, 3))
        assert np.abs(small - large).mean() < 9
        assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.93

    @pytest.mark.parametrize("category", CATEGORIES)
    def test_exposure(self, category: str) -> None:
        pictures = np.stack([draw_good(category, 0, index, 48, random_style=True) for index in range(6)])
        assert 20 < pictures.mean() < 235
        assert (pictures == 255).mean() < 0.06
        assert pictures.std() > 4

    @pytest.mark.parametrize("name", ["invented_object_0", "invented_texture_0"])
    def test_inventions(self, name: str) -> None:
        scenes = [draw_scene(name, seed, 0, 32, random_style=False) for seed in range(40)]
        assert {scene.background is None for scene in scenes} == {name in INVENTED_TEXTURE_DRAWERS}
        between = spread(mean_colours(name, [(seed, 0) for seed in range(12)]))
        within = np.mean([spread(mean_colours(name, [(seed, index) for index in range(5)])) for seed in range(12)])
        assert between > 2 * within
        for seed in range(0, 40, 4):
            twins = draw_twins(name, seed, 0, "scratch", 48)
            assert twins.good.std() > 2
            np.testing.assert_array_equal(twins.mask, (twins.good != twins.bad).any(axis=2))

    def test_contact_sheet(self) -> None:
        sheet = contact_sheet(0, 32, categories=("tile", "nut"), defects=("stain", "bent", "blur"), goods=1)
        assert sheet.size == (4 * 32, 2 * 32)
        np.testing.assert_array_equal(np.asarray(sheet)[:32, :32], draw_good("tile", 0, 0, 32))
        marked = (np.asarray(sheet) == (230, 30, 30)).all(axis=2)
        assert not marked[:, :32].any()
        assert all(marked[:, start : start + 32].any() for start in (32, 64, 96))


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"category": "bottle"}, r"`category` must be one of bearing, .*zipper, got 'bottle'\."),
            ({"image_size": 31}, r"`image_size` must be an int in \[32, 1024\] .*got 31\."),
            ({"image_size": 1025}, r"`image_size` must be .*got 1025\."),
            ({"image_size": 64.0}, r"`image_size` must be .*got 64\.0\."),
            ({"image_size": True}, r"`image_size` must be .*got True\."),
            ({"seed": -1}, r"`seed` must be an int of at least 0, got -1\."),
            ({"index": 1.5}, r"`index` must be an int of at least 0, got 1\.5\."),
            ({"kind": "dirt"}, r"`kind` must be one of bent, .*stain, got 'dirt'\."),
        ],
    )
    def test_bad_arguments(self, change: dict[str, object], message: str) -> None:
        arguments = {"category": "tile", "seed": 0, "index": 0, "kind": "stain", "image_size": 64}
        with pytest.raises(ValueError, match=message):
            draw_twins(**(arguments | change))


class TestMaths:
    def test_lattice_meets_its_table(self) -> None:
        values = table(Draws(1))
        u, v = np.meshgrid(np.arange(-3.0, 70.0), np.arange(5.0))
        expected = 2.0 * values.reshape(TABLE, TABLE)[u.astype(int) % TABLE, v.astype(int) % TABLE] - 1.0
        np.testing.assert_allclose(lattice(values, u, v), expected, atol=1e-12)

    def test_cells_against_all_points(self) -> None:
        along, across = table(Draws(2)), table(Draws(3))
        points = np.array(
            [(i + along[i * TABLE + j], j + across[i * TABLE + j]) for i in range(12) for j in range(12)],
        )
        u, v = 2.0 + 8.0 * Draws(4).array(200), 2.0 + 8.0 * Draws(5).array(200)
        distances = np.sort(np.hypot(points[:, 0, None] - u, points[:, 1, None] - v), axis=0)
        near, second, owner = cells(along, across, u, v)
        np.testing.assert_allclose(near, distances[0], atol=1e-12)
        # The second nearest may lie two cells away, beyond the search: then it is overestimated.
        assert (second >= distances[1] - 1e-12).all()
        assert (np.abs(second - distances[1]) < 1e-12).mean() > 0.97
        np.testing.assert_allclose(np.hypot(owner // TABLE + along[owner] - u, owner % TABLE + across[owner] - v), near)

    @pytest.mark.parametrize("width", [0.01, 0.05, 0.4])
    def test_band_keeps_its_width(self, width: float) -> None:
        """The covered area of a line is its width times its length, also below a pixel."""
        canvas = Canvas(64, Pose(0.0, (0.0, 0.0), 1.0), (1.0, 0.0))
        assert canvas.band(canvas.x - 0.013, width).mean() * 2.0 == pytest.approx(width, abs=1e-9)

    def test_disc_area(self) -> None:
        canvas = Canvas(128, Pose(0.3, (0.05, -0.02), 1.1), (1.0, 0.0))
        disc = canvas.inside(np.hypot(canvas.x, canvas.y) - 0.6)
        assert disc.mean() * 4.0 == pytest.approx(np.pi * (0.6 * 1.1) ** 2, rel=2e-3)

    def test_relief_is_lit_from_its_side(self) -> None:
        canvas = Canvas(32, Pose(0.0, (0.0, 0.0), 1.0), (1.0, 0.0))
        rising = canvas.relief(0.5 * canvas.x, 0.4)  # rises towards the light, so it faces away
        np.testing.assert_allclose(rising, 1.0 - 0.4 * 0.5 / np.sqrt(1.25), atol=1e-12)
        np.testing.assert_allclose(canvas.relief(0.5 * canvas.y, 0.4), 1.0, atol=1e-12)
