"""Tiles of large images: where they lie, how they are blended, and how little memory they take."""

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anomalib_aprilgan.network import tiling
from anomalib_aprilgan.network.tiling import TiledMap, run_tiled
from anomalib_aprilgan.tile_layout import blend_window, tile_positions

# Height, width, tile, overlap: even, odd, smaller than a tile on one side or both, one pixel more, no and much overlap.
GRIDS = [
    (64, 64, 32, 0.0),
    (64, 64, 32, 0.5),
    (64, 64, 64, 0.25),
    (65, 64, 64, 0.25),
    (30, 40, 64, 0.25),
    (30, 200, 64, 0.25),
    (97, 203, 32, 0.25),
    (101, 57, 10, 0.9),
    (128, 512, 96, 0.1),
    (7, 5, 1, 0.0),
    (7, 5, 2, 0.99),
    (1, 1, 1, 0.5),
    (1000, 3, 37, 1 / 3),
]
# A process of its own: the peak of this one would be that of the largest test.
MEMORY = """
import sys, types
import torch
for name, folder in (("anomalib_aprilgan", sys.argv[1]), ("anomalib_aprilgan.network", sys.argv[1] + "/network")):
    sys.modules[name] = types.ModuleType(name)  # without the rest of the package, which takes seconds to import
    sys.modules[name].__path__ = [folder]
from anomalib_aprilgan.network.tiling import run_tiled

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

run_tiled(torch.rand(3, 64, 64), 32, 0.25, 2, lambda tiles: (tiles.amax(dim=(1, 2, 3)), tiles[:, 0]))
image = torch.rand(3, 4096, 8192)
before = peak()
score, anomaly_map = run_tiled(image, 1024, 0.25, 4, lambda tiles: (tiles.amax(dim=(1, 2, 3)), tiles[:, 0]))
print(peak() - before)
assert torch.allclose(anomaly_map[:512], image[0, :512], atol=1e-5)
"""


def image(height: int, width: int) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(height * 1000 + width))


def red(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Score: the brightest green; map: the red channel."""
    return tiles[:, 1].amax(dim=(1, 2)), tiles[:, 0]


def blended(grid: tuple[int, int, int, float], tile_map: Callable[[int, int, int, int], Tensor]) -> Tensor:
    """Result of a TiledMap whose tiles' maps come from a function of top, left, height, width."""
    tiled = TiledMap(*grid)
    for top, left in tiled.positions:
        tiled.add(tile_map(top, left, *tiled.tile_shape), top, left)
    return tiled.result()


class TestPositions:
    @pytest.mark.parametrize("grid", GRIDS)
    def test_tiles_cover_the_image_and_stay_inside(self, grid: tuple[int, int, int, float]) -> None:
        height, width, tile, _ = grid
        count = torch.zeros(height, width, dtype=torch.int)
        for top, left in tile_positions(*grid):
            assert 0 <= top <= max(0, height - tile)
            assert 0 <= left <= max(0, width - tile)
            count[top : top + tile, left : left + tile] += 1
        assert count.min() >= 1

    @pytest.mark.parametrize("grid", GRIDS)
    def test_flush_with_every_border(self, grid: tuple[int, int, int, float]) -> None:
        height, width, tile, _ = grid
        positions = tile_positions(*grid)
        assert positions[0] == (0, 0)
        assert positions[-1] == (max(0, height - tile), max(0, width - tile))
        assert positions == sorted(set(positions))

    @pytest.mark.parametrize("grid", GRIDS)
    def test_neighbours_overlap_enough_and_no_tile_is_to_spare(self, grid: tuple[int, int, int, float]) -> None:
        height, width, tile, overlap = grid
        positions = tile_positions(*grid)
        step = max(1, int(tile * (1 - overlap)))
        for axis, length in ((0, height), (1, width)):
            starts = sorted({position[axis] for position in positions})
            steps = [after - before for before, after in pairwise(starts)]
            assert all(1 <= taken <= step for taken in steps)
            assert not steps or max(steps) - min(steps) <= 1
            # With one tile fewer the steps would have to be longer than the overlap allows.
            assert not steps or (len(steps) - 1) * step < length - tile

    def test_worked_values(self) -> None:
        assert tile_positions(100, 100, 100, 0.5) == [(0, 0)]
        assert tile_positions(50, 70, 100, 0.5) == [(0, 0)]
        assert tile_positions(100, 200, 100, 0.0) == [(0, 0), (0, 100)]
        assert tile_positions(100, 201, 100, 0.0) == [(0, 0), (0, 50), (0, 101)]
        assert tile_positions(150, 200, 100, 0.5) == [(top, left) for top in (0, 50) for left in (0, 50, 100)]

    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ((10, 10, 0, 0.5), ValueError, "`tile_size` must be at least 1, got 0"),
            ((10, 10, 2.5, 0.5), TypeError, "`tile_size` must be an int, got 2.5"),
            ((10, 10, True, 0.5), TypeError, "`tile_size` must be an int, got True"),
            ((10, 10, 5, 1.0), ValueError, r"`tile_overlap` must be a share of the tile in \[0, 1\).*got 1.0"),
            ((10, 10, 5, -0.1), ValueError, "`tile_overlap`.*got -0.1"),
            ((10, 10, 5, float("nan")), ValueError, "`tile_overlap`.*got nan"),
            ((0, 10, 5, 0.5), ValueError, "`height` must be at least 1, got 0"),
            ((10, -1, 5, 0.5), ValueError, "`width` must be at least 1, got -1"),
        ],
    )
    def test_refuses(self, arguments: tuple[int, int, int, float], error: type[Exception], text: str) -> None:
        with pytest.raises(error, match=text):
            tile_positions(*arguments)


class TestWindow:
    @pytest.mark.parametrize("length", [1, 2, 5, 96])
    def test_positive_symmetric_highest_in_the_middle(self, length: int) -> None:
        window = blend_window(length)
        assert window.shape == (length,)
        assert 0 < window.min() <= window.max() <= 1
        assert (window == window[::-1]).all()
        assert window.argmax().item() in {(length - 1) // 2, length // 2}

    def test_worked_values(self) -> None:
        assert blend_window(4).tolist() == [0.25, 0.75, 0.75, 0.25]
        assert blend_window(5).tolist() == pytest.approx([0.2, 0.6, 1.0, 0.6, 0.2])

    def test_neighbours_fade_linearly_into_each_other(self) -> None:
        """One tile of ones beside one of zeros: a straight line across what both cover, flat outside."""
        result = blended((100, 150, 100, 0.5), lambda _top, left, h, w: torch.full((h, w), float(left == 0)))
        expected = torch.cat([torch.ones(50), 1 - (torch.arange(50) + 0.5) / 50, torch.zeros(50)])
        torch.testing.assert_close(result, expected.expand(100, 150))


class TestTiledMap:
    @pytest.mark.parametrize("grid", [grid for grid in GRIDS if len(tile_positions(*grid)) < 40])
    def test_weights_sum_to_one(self, grid: tuple[int, int, int, float]) -> None:
        tiled = TiledMap(*grid)
        total = torch.zeros(grid[:2], dtype=torch.float64)
        height, width = tiled.tile_shape
        for top, left in tiled.positions:
            one = TiledMap(*grid)
            for position in one.positions:
                one.add(torch.full((height, width), float(position == (top, left))), *position)
            weights = one.result().double()
            assert weights.min() >= 0
            assert (weights[top : top + height, left : left + width] > 0).all()
            total += weights
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("grid", GRIDS)
    def test_constant_stays_constant(self, grid: tuple[int, int, int, float]) -> None:
        result = blended(grid, lambda *place: torch.full(place[2:], 0.7))
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, torch.full(grid[:2], 0.7), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("grid", GRIDS)
    def test_tiles_of_a_map_give_the_map(self, grid: tuple[int, int, int, float]) -> None:
        whole = image(*grid[:2])[0]
        result = blended(grid, lambda top, left, h, w: whole[top : top + h, left : left + w])
        torch.testing.assert_close(result, whole, atol=5e-6, rtol=0)

    @pytest.mark.parametrize("grid", [(96, 160, 64, 0.25), (97, 203, 64, 0.5), (40, 200, 64, 0.25)])
    @pytest.mark.parametrize("size", [(16, 16), (37, 37), (128, 128), (20, 48)])
    def test_a_ramp_stays_a_ramp_through_maps_of_another_size(
        self, grid: tuple[int, int, int, float], size: tuple[int, int]
    ) -> None:
        rows, columns = torch.meshgrid(torch.arange(grid[0]) + 0.5, torch.arange(grid[1]) + 0.5, indexing="ij")
        ramp = 0.3 * rows + columns

        def shrunk(top: int, left: int, height: int, width: int) -> Tensor:
            y = top + (torch.arange(size[0]) + 0.5) * height / size[0]
            x = left + (torch.arange(size[1]) + 0.5) * width / size[1]
            return 0.3 * y[:, None] + x

        error = (blended(grid, shrunk) - ramp).abs()
        # A bilinear resize is flat in the outer half pixel of a small map; the inside is exact.
        edge = 0.5 * (0.3 * 64 / size[0] + 64 / size[1])
        assert error.max() <= edge
        margin = 32  # half a tile: there the nearest tile's border has no weight on its own
        inside = error[margin:-margin, margin:-margin] if grid[0] > 2 * margin else error[:, margin:-margin]
        assert inside.mean() < 0.2 * edge

    def test_against_weights_written_out(self) -> None:
        grid = (50, 83, 24, 0.4)
        maps = {place: image(24, 24 + number)[0][:, :24] for number, place in enumerate(tile_positions(*grid))}
        total, weight = torch.zeros(50, 83, dtype=torch.float64), torch.zeros(50, 83, dtype=torch.float64)
        for (top, left), tile_map in maps.items():
            for y in range(24):
                for x in range(24):
                    share = min(y + 0.5, 23.5 - y) * min(x + 0.5, 23.5 - x)
                    total[top + y, left + x] += share * tile_map[y, x].item()
                    weight[top + y, left + x] += share
        result = blended(grid, lambda top, left, _h, _w: maps[top, left])
        torch.testing.assert_close(result.double(), total / weight, atol=1e-6, rtol=0)

    def test_result_needs_every_tile_once(self) -> None:
        tiled = TiledMap(32, 64, 32, 0.0)
        tiled.add(torch.zeros(32, 32), 0, 0)
        with pytest.raises(RuntimeError, match="1 of 2 tiles are missing: call `add`"):
            tiled.result()
        with pytest.raises(ValueError, match=r"\(0, 0\) was added before"):
            tiled.add(torch.zeros(32, 32), 0, 0)
        with pytest.raises(ValueError, match=r"\(0, 31\) is none of `positions`"):
            tiled.add(torch.zeros(32, 32), 0, 31)


class TestRunTiled:
    @pytest.mark.parametrize("grid", GRIDS)
    def test_pixelwise_scores_are_those_of_the_whole(self, grid: tuple[int, int, int, float]) -> None:
        whole = image(*grid[:2])
        score, anomaly_map = run_tiled(whole, *grid[2:], 3, red)
        assert score.item() == whole[1].max().item()
        torch.testing.assert_close(anomaly_map, whole[0], atol=5e-6, rtol=0)

    @pytest.mark.parametrize("batch_size", [2, 5, 1000])
    def test_batch_size_changes_nothing(self, batch_size: int) -> None:
        def score(tiles: Tensor) -> tuple[Tensor, Tensor]:
            assert 1 <= len(tiles) <= batch_size
            return tiles.std(dim=(1, 2, 3)), F.avg_pool2d(tiles[:, 0], 8)

        whole = image(150, 290)
        one_by_one = run_tiled(
            whole, 64, 0.3, 1, lambda tiles: (tiles.std(dim=(1, 2, 3)), F.avg_pool2d(tiles[:, 0], 8))
        )
        together = run_tiled(whole, 64, 0.3, batch_size, score)
        torch.testing.assert_close(together, one_by_one, atol=1e-6, rtol=0)

    def test_one_tile_is_the_untiled_result(self) -> None:
        whole = image(40, 50)
        score, anomaly_map = run_tiled(whole, 64, 0.25, 4, red)
        assert torch.equal(score, red(whole[None])[0][0])
        assert torch.equal(anomaly_map, whole[0])

    def test_the_score_is_the_highest_of_the_tiles(self) -> None:
        scores = iter([0.1, 0.9, 0.3, 0.2])
        score, _ = run_tiled(
            image(64, 64), 32, 0.0, 1, lambda tiles: (torch.tensor([next(scores)]), torch.zeros_like(tiles[:, 0]))
        )
        assert score.item() == pytest.approx(0.9)

    def test_bytes_and_the_image_are_left_alone(self) -> None:
        pixels = (image(70, 90) * 255).to(torch.uint8)
        copy = pixels.clone()

        def score(tiles: Tensor) -> tuple[Tensor, Tensor]:
            assert tiles.dtype == torch.uint8
            result = red(tiles / 255)
            tiles.zero_()
            return result

        _, anomaly_map = run_tiled(pixels, 32, 0.25, 2, score)
        assert torch.equal(pixels, copy)
        torch.testing.assert_close(anomaly_map, pixels[0] / 255, atol=1e-6, rtol=0)

    def test_keeps_no_graph(self) -> None:
        weight = torch.ones(1, requires_grad=True)
        score, anomaly_map = run_tiled(
            image(64, 64), 32, 0.25, 2, lambda tiles: (tiles[:, 1].amax(dim=(1, 2)) * weight, tiles[:, 0] * weight)
        )
        assert not score.requires_grad
        assert not anomaly_map.requires_grad

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match=r"`image` must be \(3, H, W\), got \(1, 3, 8, 8\). Pass the images"):
            run_tiled(image(8, 8)[None], 4, 0.0, 1, red)
        with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
            run_tiled(image(8, 8), 4, 0.0, 0, red)
        with pytest.raises(ValueError, match="`score` must return a score and a map per tile, got 1 and 2 for 2"):
            run_tiled(image(8, 8), 4, 0.0, 2, lambda tiles: (tiles[:1, 0, 0, 0], tiles[:, 0]))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_memory_beside_the_image_is_its_map_and_a_batch_of_tiles() -> None:
    """8192 x 4096 pixels: the image takes 403 MB, its map 134; four tiles of 1024 pixels 50."""
    # Three goes: what the system keeps for a process now and then counts as well, and only ever adds. A fixed
    # threshold has glibc return what is freed; one that it moves by itself kept 60 to 80 MB in one go of four.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    peaks = []
    while len(peaks) < 3 and not (peaks and peaks[-1] < 250):
        command = [sys.executable, "-c", MEMORY, str(Path(tiling.__file__).parents[1])]
        run = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False, env=environment)
        assert run.returncode == 0, run.stderr
        peaks.append(int(run.stdout) / 1e6)
    assert 120 < min(peaks) < 250, peaks
