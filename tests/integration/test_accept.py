"""Good parts that join a memory bank, and what catching escaped defects would take: model, command, files."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.checkpoint import check_file, rewrite
from anomalib_aprilgan.command import main

from ..conftest import DATASET
from .runs import by_path, category, engine, good, read

Build = Callable[..., AprilGAN]
Command = Callable[..., str]
SHARE = 0.25  # 3 images are enough for it
BOTTLES = [str(file) for file in sorted(good("bottle").iterdir())]
SEEN = sorted((DATASET / "bottle" / "test" / "good").iterdir())
DEFECTS = sorted((DATASET / "bottle" / "test" / "hole").iterdir())


def arguments(**overrides: Any) -> dict[str, Any]:
    given = {"class_name": "bottle", "k_shot": 2, "references": BOTTLES[:2], "calibration": BOTTLES[2:]}
    return given | {"false_positive_rate": SHARE} | overrides


def buffers(model: AprilGAN) -> dict[str, bytes]:
    """Shape, type and bytes of all that a checkpoint holds."""
    return {
        name: f"{value.dtype} {tuple(value.shape)} ".encode() + value.numpy().tobytes()
        for name, value in model.state_dict().items()
    }


def records(model: AprilGAN) -> list[dict[str, Any]]:
    return [recipes.to_dict() for recipes in model.made.rows]


@pytest.fixture
def checkpoint(april_gan: Build, tmp_path: Path) -> Path:
    """Of a test run, as a user has it."""
    model, runner = april_gan(**arguments()), engine(tmp_path / "runs")
    runner.test(model, datamodule=category("bottle"), verbose=False)
    runner.trainer.save_checkpoint(tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*given: object) -> str:
        capsys.readouterr()
        main([str(one) for one in given])
        return capsys.readouterr().out

    return call


@pytest.fixture
def refused(run: Command, capsys: pytest.CaptureFixture[str]) -> Command:
    """The error of a command that must end with exit code 2."""

    def call(*given: object) -> str:
        with pytest.raises(SystemExit) as ended:
            run(*given)
        assert ended.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    return call


class TestModel:
    def test_accepted_parts_score_below_the_threshold_and_others_hardly_change(self, april_gan: Build) -> None:
        model = april_gan(**arguments())
        model.setup("predict")
        file, other = SEEN[0], DEFECTS[0]
        with torch.no_grad():
            before = model.predict(read(other))
        (joined,) = model.accept(str(file))
        assert (joined.file, joined.was_known) == (str(file), False)
        with torch.no_grad():
            seen, after = model.predict(read(file)), model.predict(read(other))
            assert joined.score_after == pytest.approx(model(read(file)).pred_score.item(), abs=1e-5)
        assert joined.score_after < 0.5
        assert seen.anomaly_map.max() < 1e-4  # neither distance nor a word of the text against it is left
        assert seen.text_probability < 1e-4
        assert (after.anomaly_map <= before.anomaly_map + 1e-5).all()
        assert (after.text_probability <= before.text_probability).all()
        assert after.anomaly_map.max() > 0.5 * before.anomaly_map.max()

    def test_thresholds_are_those_of_the_grown_bank(self, april_gan: Build) -> None:
        model = april_gan(**arguments())
        model.setup("predict")
        before = model.post_processor.values()
        model.accept(str(SEEN[0]))
        values = model.post_processor.values()
        assert values != before
        with torch.no_grad():
            raw = [model.predict(read(file)) for file in BOTTLES[2:]]
            statistic = [model.post_processor.fusion.statistic(one.anomaly_map) for one in raw]
            scores = [
                model.post_processor.fused(one.text_probability, of_map, None)
                for one, of_map in zip(raw, statistic, strict=True)
            ]
        held_out = model.post_processor.of_class(0).good_parts()[0]
        torch.testing.assert_close(held_out, torch.cat(scores), atol=1e-6, rtol=0)
        assert held_out.min() <= values["image_threshold"] <= held_out.max()

    @pytest.mark.parametrize(
        "changed",
        [
            {},
            {"calibration": "references"},
            {"calibration": None},
            {"memory_size": 50, "memory_dtype": "float16"},
            {"tile_size": 64},
        ],
    )
    def test_undo_gives_every_byte_back(self, april_gan: Build, changed: dict[str, Any]) -> None:
        model = april_gan(**arguments(**changed))
        model.setup("predict")
        states = [(buffers(model), records(model))]
        for files in ([str(SEEN[0]), str(SEEN[1])], str(SEEN[2])):
            model.accept(files)
            states.append((buffers(model), records(model)))
        assert states[0][0] != states[1][0] != states[2][0]
        assert [len(acceptance.files) for acceptance in model.made.rows[0].accepted] == [2, 1]
        assert model.undo_accept().files == [str(SEEN[2])]
        assert (buffers(model), records(model)) == states[1]
        model.undo_accept("bottle")
        assert (buffers(model), records(model)) == states[0]
        model.setup("predict")  # finds all as it should be
        assert (buffers(model), records(model)) == states[0]

    def test_what_is_there_already_changes_nothing(self, april_gan: Build, tmp_path: Path) -> None:
        model = april_gan(**arguments())
        model.setup("predict")
        copies = [shutil.copy(BOTTLES[0], tmp_path / "a.png"), shutil.copy(SEEN[0], tmp_path / "b.png")]
        model.accept(str(SEEN[0]))
        before = buffers(model), records(model)
        found = model.accept([str(copy) for copy in copies])
        assert [one.was_known for one in found] == [True, True]
        assert [one.score_before == one.score_after for one in found] == [True, True]
        assert (buffers(model), records(model)) == before
        twice = model.accept([str(SEEN[1]), str(shutil.copy(SEEN[1], tmp_path / "twice.png"))])
        assert [one.was_known for one in twice] == [False, True]
        assert len(model.made.rows[0].accepted[-1].files) == 1

    def test_of_several_classes_one_grows(self, april_gan: Build) -> None:
        tiles = [str(file) for file in sorted(good("tile").iterdir())]
        references = {"bottle": BOTTLES[:2], "tile": tiles[:2]}
        calibration = {"bottle": BOTTLES[2:], "tile": tiles[2:]}
        given = {"class_name": ["bottle", "tile"], "references": references, "calibration": calibration}
        model = april_gan(**arguments(**given))
        model.setup("predict")
        before = buffers(model)
        values = model.post_processor.of_class("tile").values()
        with pytest.raises(ValueError, match="`class_name` is needed to choose among the classes"):
            model.accept(str(SEEN[0]))
        with pytest.raises(ValueError, match="`class_name` must be one of bottle, tile, got 'nut'"):
            model.accept(str(SEEN[0]), "nut")
        model.accept(str(SEEN[0]), "bottle")
        assert model.post_processor.of_class("tile").values() == values
        assert len(model.model.few_shot.accepted(1)) == 0
        with pytest.raises(ValueError, match="nothing was accepted for 'tile'"):
            model.undo_accept("tile")
        model.undo_accept()
        assert buffers(model) == before

    def test_thresholds_of_a_validation_stay(self, april_gan: Build, tmp_path: Path) -> None:
        model = april_gan(**arguments(calibration=None))
        engine(tmp_path).validate(model, datamodule=category("bottle"), verbose=False)
        learned = model.post_processor.values()
        model.accept(str(SEEN[0]))
        assert model.post_processor.values() == learned
        engine(tmp_path).test(model, datamodule=category("bottle"), verbose=False)
        assert len(model.model.few_shot.accepted(0)) == 1

    def test_an_error_on_the_way_leaves_all_as_it_was(self, april_gan: Build, tmp_path: Path) -> None:
        files = [str(shutil.copy(file, tmp_path)) for file in BOTTLES[2:]]
        model = april_gan(**arguments(calibration=files))
        model.setup("predict")
        before = buffers(model), records(model)
        Path(files[0]).unlink()
        with pytest.raises(FileNotFoundError, match="`calibration`: no file"):
            model.accept(str(SEEN[0]))
        assert (buffers(model), records(model)) == before
        Path(files[0]).write_bytes(b"broken")  # which shows while thresholds are being calibrated
        with pytest.raises(ValueError, match=r"`calibration`: .* cannot be read as an image"):
            model.accept(str(SEEN[0]))
        assert (buffers(model), records(model)) == before
        (tmp_path / "broken.png").write_bytes(b"broken")
        with pytest.raises(ValueError, match=r"`files`: .*broken\.png cannot be read as an image"):
            model.accept([str(SEEN[0]), str(tmp_path / "broken.png")])
        assert (buffers(model), records(model)) == before

    @pytest.mark.parametrize(
        ("changed", "text"),
        [
            ({"k_shot": 0, "references": None}, r"compares with no references \(`k_shot` is 0\)"),
            (
                {"k_shot": 3, "references_unlabelled": True, "references": BOTTLES[:3]},
                "unlabelled images",
            ),
        ],
    )
    def test_models_that_cannot_grow(self, april_gan: Build, changed: dict[str, Any], text: str) -> None:
        with pytest.raises(ValueError, match=f"`accept` adds to a memory bank of verified good parts.*{text}"):
            april_gan(**arguments(**changed)).accept(str(SEEN[0]))

    def test_reject_tells_threshold_and_price(self, april_gan: Build) -> None:
        model = april_gan(**arguments())
        model.setup("predict")
        model.post_processor.set_values(image_threshold=5.0)  # nothing is found
        before = buffers(model)
        found = model.reject([str(file) for file in DEFECTS])
        assert buffers(model) == before
        held_out = model.post_processor.of_class(0).good_parts()[0]
        for one, file in zip(found, DEFECTS, strict=True):
            assert not one.is_caught
            assert one.score < 0.5
            assert one.good_parts_flagged == pytest.approx((held_out > one.threshold).float().mean().item())
            model.post_processor.set_values(image_threshold=one.threshold)
            with torch.no_grad():
                assert model(read(file)).pred_label.item()
                raised = torch.nextafter(torch.tensor(one.threshold), torch.tensor(9.0)).item()
                model.post_processor.set_values(image_threshold=raised)
                assert not model(read(file)).pred_label.item()
        uncalibrated = april_gan(**arguments(calibration=None)).reject(str(DEFECTS[0]))
        assert uncalibrated[0].good_parts_flagged is None


class TestCommand:
    def test_writes_checkpoints_beside_the_old_one(self, checkpoint: Path, run: Command) -> None:
        before = checkpoint.read_bytes()
        printed = run("accept", SEEN[0], SEEN[1], "--ckpt_path", checkpoint)
        first = checkpoint.with_name("model-accepted-1.ckpt")
        assert f"Checkpoint: {first}" in printed
        assert printed.count(": joined; score 0.") == 2
        assert "still anomalous" not in printed
        content = json.loads(run("accept", SEEN[2], "--ckpt_path", first, "--json"))
        second = checkpoint.with_name("model-accepted-2.ckpt")
        assert content["ckpt_path"] == str(second)
        assert [one["file"] for one in content["accepted"]] == [str(SEEN[2])]
        assert checkpoint.read_bytes() == before
        loaded = AprilGAN.load_from_checkpoint(second)
        assert [acceptance.files for acceptance in loaded.made.rows[0].accepted] == [
            [str(SEEN[0]), str(SEEN[1])], [str(SEEN[2])]
        ]  # fmt: skip
        assert "nothing was written" not in run("accept", SEEN[2], "--ckpt_path", second)
        assert not checkpoint.with_name("model-accepted-3.ckpt").exists()

    def test_undo_is_the_old_checkpoint(self, checkpoint: Path, run: Command, tmp_path: Path) -> None:
        run("accept", SEEN[0], "--ckpt_path", checkpoint, "--out", tmp_path / "grown.ckpt")
        printed = run("accept", "--undo", "--ckpt_path", tmp_path / "grown.ckpt", "--out", tmp_path / "undone.ckpt")
        assert f"{SEEN[0]}: taken back" in printed
        old, grown, undone = (
            torch.load(tmp_path / f"{name}.ckpt", weights_only=False) for name in ("model", "grown", "undone")
        )
        assert len(old["state_dict"]) > 20
        for name, value in old["state_dict"].items():
            assert value.numpy().tobytes() == undone["state_dict"][name].numpy().tobytes(), name
        assert any(not torch.equal(value, grown["state_dict"][name]) for name, value in old["state_dict"].items())
        assert old["anomalib_aprilgan"] == undone["anomalib_aprilgan"]
        assert old["state_dict"].keys() == undone["state_dict"].keys()

    def test_the_engine_takes_what_was_written(self, checkpoint: Path, run: Command, tmp_path: Path) -> None:
        run("accept", SEEN[0], "--ckpt_path", checkpoint, "--out", tmp_path / "grown.ckpt")
        for precision in ("32-true", "bf16-mixed"):
            model = AprilGAN.load_from_checkpoint(tmp_path / "grown.ckpt")
            runner = engine(tmp_path / precision, precision=precision)
            found = by_path(runner.predict(model, data_path=SEEN[0].parent, ckpt_path=tmp_path / "grown.ckpt") or [])
            assert found[str(SEEN[0])]["pred_score"] < 0.5
            assert len(model.model.few_shot.accepted(0)) == 1

    def test_reject_prints_the_price_and_collects_for_training(
        self, checkpoint: Path, run: Command, tmp_path: Path
    ) -> None:
        masks = tmp_path / "masks"
        masks.mkdir()
        for file in DEFECTS:
            Image.effect_noise(Image.open(file).size, 90).save(masks / file.name)
        given = [*DEFECTS, "--ckpt_path", checkpoint]
        printed = run("reject", *given, "--masks", masks, "--training_folder", tmp_path / "training")
        assert printed.count("of the good parts") == len(DEFECTS)
        assert "set_values(image_threshold=" in printed
        assert len(list((tmp_path / "training" / "defective").iterdir())) == len(DEFECTS)
        found = json.loads(run("reject", *given, "--json"))
        assert found[0].keys() == {"file", "score", "is_caught", "threshold", "good_parts_flagged"}


class TestBadInput:
    def test_commands_that_make_no_sense(self, refused: Command, checkpoint: Path) -> None:
        assert "either files or --undo" in refused("accept", "--ckpt_path", checkpoint)
        assert "either files or --undo" in refused("accept", SEEN[0], "--undo", "--ckpt_path", checkpoint)
        assert "--masks and --training_folder go together" in refused(
            "reject", DEFECTS[0], "--masks", checkpoint.parent, "--ckpt_path", checkpoint
        )
        assert "exists already" in refused("accept", SEEN[0], "--ckpt_path", checkpoint, "--out", checkpoint)

    def test_checkpoints_that_are_none(self, refused: Command, tmp_path: Path) -> None:
        assert "no checkpoint file" in refused("accept", SEEN[0], "--ckpt_path", tmp_path / "nothing.ckpt")
        (tmp_path / "text.ckpt").write_text("text")
        assert "cannot be read as a checkpoint" in refused("accept", SEEN[0], "--ckpt_path", tmp_path / "text.ckpt")
        torch.save({"state_dict": {}, "pytorch-lightning_version": "2.0.0"}, tmp_path / "other.ckpt")
        assert "AprilGAN" in refused("accept", SEEN[0], "--ckpt_path", tmp_path / "other.ckpt")

    def test_undo_without_history(self, refused: Command, checkpoint: Path) -> None:
        assert "nothing was accepted, so that there is nothing to take back" in refused(
            "accept", "--undo", "--ckpt_path", checkpoint
        )

    def test_files_and_classes(self, refused: Command, checkpoint: Path, tmp_path: Path) -> None:
        assert "`files`" in refused("accept", tmp_path / "nothing.png", "--ckpt_path", checkpoint)
        (tmp_path / "broken.png").write_bytes(b"broken")
        assert "broken.png cannot be read as an image" in refused(
            "accept", tmp_path / "broken.png", "--ckpt_path", checkpoint
        )
        assert "must be one of bottle, got 'nut'" in refused(
            "accept", SEEN[0], "--class_name", "nut", "--ckpt_path", checkpoint
        )
        assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["model.ckpt"]

    def test_a_history_that_was_edited(self, refused: Command, checkpoint: Path, run: Command, tmp_path: Path) -> None:
        run("accept", SEEN[0], "--ckpt_path", checkpoint, "--out", tmp_path / "grown.ckpt")
        content = torch.load(tmp_path / "grown.ckpt", weights_only=False)
        content["anomalib_aprilgan"]["rows"][0]["accepted"][0]["parts"] = "many"
        torch.save(content, tmp_path / "edited.ckpt")
        assert "the entry 'parts' must be like" in refused("accept", "--undo", "--ckpt_path", tmp_path / "edited.ckpt")


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"parts": 5}, "the history tells of more parts than the memory bank holds"),
        ({"parts": 0}, "the history of accepted parts is damaged: parts"),
        ({"values": {"image_threshold": [float("nan")]}}, "the history of accepted parts is damaged: image_threshold"),
        ({"values": {"image_threshold": [0.5, 0.6]}}, "the history of accepted parts is damaged: image_threshold"),
        ({"values": {"secret": [0.5]}}, "the history of accepted parts is damaged: secret"),
        ({"recipes": {"text": None}}, "the history of accepted parts is damaged: text"),
    ],
)
def test_a_history_that_makes_no_sense(
    refused: Command, checkpoint: Path, run: Command, tmp_path: Path, changed: dict[str, Any], text: str
) -> None:
    run("accept", SEEN[0], "--ckpt_path", checkpoint, "--out", tmp_path / "grown.ckpt")
    content = torch.load(tmp_path / "grown.ckpt", weights_only=False)
    content["anomalib_aprilgan"]["rows"][0]["accepted"][0] |= changed
    torch.save(content, tmp_path / "edited.ckpt")
    assert text in refused("accept", "--undo", "--ckpt_path", tmp_path / "edited.ckpt")
    assert sorted(path.name for path in tmp_path.glob("*accepted*")) == []


def grow_for_ever(checkpoint: Path, seed: int, ready: Any) -> None:
    """Accept and take back at random, a checkpoint each time, until somebody ends it."""
    torch.set_num_threads(1)
    draw, path = np.random.default_rng(seed), checkpoint
    while True:
        model: Any = AprilGAN.load_from_checkpoint(path).eval()
        if model.made.rows[0].accepted and draw.random() < 0.5:
            model.undo_accept()
        else:
            model.accept([str(file) for file in draw.permutation(SEEN)[:2]])
        number = 1 + len(list(checkpoint.parent.glob("*.ckpt")))
        path = checkpoint.with_name(f"{number:03}.ckpt")
        ready.set()
        rewrite(checkpoint, path, model, model.settings, model.made)


@pytest.mark.thorough
@pytest.mark.parametrize("processes", [15, pytest.param(50, marks=pytest.mark.slow)])
def test_whoever_is_killed_leaves_whole_checkpoints(checkpoint: Path, processes: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["anomalib_aprilgan", "tests.integration.test_accept"])
    draw, written = np.random.default_rng(0), 0
    for seed in range(processes):
        ready = context.Event()
        process = context.Process(target=grow_for_ever, args=(checkpoint, seed, ready), daemon=True)
        process.start()
        assert ready.wait(60)
        time.sleep(draw.random() * 0.1)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        for path in checkpoint.parent.glob("*.ckpt"):
            check_file(path)
            if path != checkpoint:
                model: Any = AprilGAN.load_from_checkpoint(path)
                assert len(model.model.few_shot.accepted(0)) == sum(one.parts for one in model.made.rows[0].accepted)
                path.unlink()
                written += 1
    assert written > processes / 10
    assert [path.name for path in checkpoint.parent.glob("*.ckpt")] == ["model.ckpt"]
