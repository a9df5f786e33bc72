"""The benchmark through its own command: cells, shared pass, resuming, tables, and what can go wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from anomalib_aprilgan import AprilGAN, DrawnInspection
from anomalib_aprilgan.clip.backbone import load_clip
from anomalib_aprilgan.demo import built_in
from anomalib_aprilgan.evaluation import collecting
from anomalib_aprilgan.evaluation.benchmark import main
from anomalib_aprilgan.evaluation.cells import COLUMNS, FULL
from anomalib_aprilgan.evaluation.many_banks import predict_banks
from anomalib_aprilgan.evaluation.metrics import METRICS
from anomalib_aprilgan.evaluation.plan import read_config
from anomalib_aprilgan.evaluation.published import DATASETS, official_code, report_table
from anomalib_aprilgan.preparation import network as preparation

from ..conftest import DATASET
from ..stand_ins import write_mvtec_ad, write_visa

CONFIGS = Path(__file__).parents[2] / "configs"
OURS = {
    "class_path": "AprilGAN",
    "init_args": {
        "backbone": built_in.ARCHITECTURE,
        "pretrained": built_in.PRETRAINED,
        "image_size": built_in.IMAGE_SIZE,
        "stages": list(built_in.STAGES),
        "memory_stages": list(built_in.MEMORY_STAGES),
    },
}
OTHERS = {
    "WinCLIP": {"class_path": "WinClip", "weights": "generated"},
    "PatchCore": {
        "class_path": "Patchcore",
        "weights": "generated",
        "init_args": {"backbone": "resnet18", "layers": ["layer2"]},
    },
    "PaDiM": {
        "class_path": "Padim",
        "weights": "generated",
        "init_args": {"backbone": "resnet18", "layers": ["layer1"], "n_features": 8},
    },
}
Configure = Callable[..., Path]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Drawn once for all tests of this file."""
    arguments = {
        "root": str(tmp_path_factory.mktemp("drawn")),
        "category": "nut",
        "image_size": 96,
        "num_train": 5,
        "num_test": 6,
        "seed": 300,
        "num_workers": 0,
    }
    return {"class_path": "DrawnInspection", "init_args": arguments}


@pytest.fixture
def configure(tmp_path: Path, drawn: dict[str, Any]) -> Configure:
    """Writes a config; entries of ``benchmark`` override."""

    def write(name: str = "runs", **benchmark: Any) -> Path:
        config = {
            "accelerator": "cpu",
            "results": str(tmp_path / name),
            "benchmark": {"k_shot": [0, 1], "seed": [0], "model": {"AprilGAN": OURS}, "data": drawn} | benchmark,
        }
        path = tmp_path / f"{name}.yaml"
        OmegaConf.save(config, path)
        return path

    return write


def run(config: Path, *overrides: str) -> tuple[pd.DataFrame, Path]:
    """The table of results of a config, and its folder."""
    main(["--config", str(config), *overrides])
    folder = Path(OmegaConf.load(config).results)
    return pd.read_csv(folder / "results.csv", keep_default_na=False, na_values=[""]), folder


def table_without_durations(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "results.csv").drop(columns="seconds")


def test_models_side_by_side_leave_all_files(configure: Configure, drawn: dict[str, Any]) -> None:
    few = drawn | {"init_args": drawn["init_args"] | {"num_test": 4}}  # the others take their time
    table, folder = run(configure(k_shot=[0, 2], model={"AprilGAN": OURS} | OTHERS, data=few))
    assert tuple(table.columns) == COLUMNS
    random = [f"{name} (random weights)" for name in OTHERS]
    assert [(row.model, row.k_shot) for row in table.itertuples()] == [
        ("AprilGAN", 0),
        ("AprilGAN", 2),
        (random[0], 0),
        *((name, 2) for name in random),
    ]
    assert set(table.status) == {"done"}
    assert table[list(METRICS)].notna().all().all()
    assert table[list(METRICS)].stack().between(0, 1).all()
    assert set(table.n_images) == {8}
    assert set(table.n_anomalous) == {4}
    assert table.image_auroc[0] > 0.55  # the trained one
    assert (table.seconds > 0).all()

    found = json.loads((folder / "results.json").read_text())
    few_shot = [cell for cell in found["cells"] if cell["cell"]["k_shot"] == 2]
    assert len(few_shot) == 4
    references = [cell["details"]["references"] for cell in few_shot]
    assert len(references[0]) == 2
    assert all(sorted(files) == sorted(references[0]) for files in references)  # all models had the same images
    assert len({cell["details"]["weights_sha256"] for cell in few_shot}) == 4
    assert found["provenance"]["versions"]["anomalib"]
    assert found["provenance"]["config"]["benchmark"]["seed"] == [0]

    text = (folder / "tables.md").read_text()
    assert "the figures mean nothing" in text.splitlines()[2]
    for heading in ("# Summary", "# Other metrics", "# Every category"):
        assert heading in text
    assert "# Failed" not in text
    assert f"| zero-shot | AprilGAN | {100 * table.pixel_auroc[0]:.1f} |" in text
    names = {path.name for path in folder.glob("*.png")}
    assert names == {
        "bars_image_auroc.png",
        "bars_pixel_auroc.png",
        "bars_aupro.png",
        "shots.png",
        "heatmaps_AprilGAN-DrawnInspection.png",
    }
    for name in names:
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 100
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 10
    assert not list((folder / "scratch").iterdir())


def test_shared_pass_equals_the_settings_one_by_one(configure: Configure) -> None:
    settings = {"k_shot": [0, 1, 3], "seed": [0, 1]}
    single, _ = run(configure("single", **settings, shared_pass=False))
    for metrics, tolerance in (("exact", 1e-6), ("streaming", 1e-4)):
        shared, _ = run(configure(metrics, **settings, metrics=metrics))
        assert len(shared) == len(single) == 5
        assert shared.model.equals(single.model)
        assert (shared[list(METRICS)] - single[list(METRICS)]).abs().max().max() < tolerance
        assert shared.pixel_auroc.nunique() > 3  # the draws differ


@pytest.mark.parametrize("mixed_precision", [False, True])
@pytest.mark.parametrize("options", [{}, {"smoothing_sigma": 1.5, "neighbourhood": 3, "memory_stages": (1, 3)}])
def test_many_banks_from_one_pass_equal_predictions_one_by_one(
    april_gan: Callable[..., AprilGAN], options: dict[str, Any], mixed_precision: bool
) -> None:
    model = april_gan(class_name="tile", k_shot=4, references=str(DATASET / "tile" / "train" / "good"), **options)
    model.setup("predict")
    network, images = model.model, torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    banks = [[], [2], [0, 3], [3, 2, 1, 0]]
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision):
        text, maps = predict_banks(network, network.few_shot, images, banks)
        for bank, found in zip(banks, maps, strict=True):
            with torch.no_grad():
                alone = network.predict(images, without={0, 1, 2, 3} - set(bank), few_shot=bool(bank))
            torch.testing.assert_close(found, alone.anomaly_map, atol=1e-6, rtol=0)
            torch.testing.assert_close(text, alone.text_probability, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shared_pass", [True, False])
def test_given_references_serve_all_settings_that_take_some(
    configure: Configure, drawn: dict[str, Any], shared_pass: bool
) -> None:
    data = DrawnInspection(**drawn["init_args"])
    data.prepare_data()
    data.setup()
    given = sorted(data.train_data.samples.image_path)[:2]
    ours = OURS | {"init_args": OURS["init_args"] | {"references": given}}
    table, folder = run(configure(k_shot=[0, 2], model={"AprilGAN": ours}, shared_pass=shared_pass))
    assert list(table.status) == ["done", "done"]
    assert table.pixel_auroc[0] != table.pixel_auroc[1]
    if shared_pass:
        cells = json.loads((folder / "results.json").read_text())["cells"]
        assert [cell["details"]["references"] for cell in cells] == [[], given]


def test_killed_and_restarted_equals_undisturbed(configure: Configure, tmp_path: Path) -> None:
    settings = {"k_shot": [0, 1, 2], "shared_pass": False}
    _, undisturbed = run(configure("undisturbed", **settings))
    config, folder = configure("killed", **settings), tmp_path / "killed"
    command = [sys.executable, "-m", "anomalib_aprilgan.evaluation.benchmark", "--config", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(folder.glob("cells/*.json")):
        assert process.poll() is None, "It ended before it could be killed."
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("cells/*.json")}
    assert 1 <= len(kept) < 3
    assert not (folder / "results.csv").exists()
    run(config)
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())  # not done twice
    pd.testing.assert_frame_equal(
        table_without_durations(folder), table_without_durations(undisturbed), check_exact=True
    )


def test_a_cell_that_fails_is_reported_and_the_rest_is_done(configure: Configure) -> None:
    config = configure(k_shot=[0, 9, 1], model={"AprilGAN": OURS, "PatchCore": OTHERS["PatchCore"]})
    with pytest.raises(SystemExit, match="2 of 5 cells failed"):
        run(config)
    folder = Path(OmegaConf.load(config).results)
    table = pd.read_csv(folder / "results.csv")
    assert list(table.status) == ["done", "failed", "done", "failed", "done"]
    assert table.reason[1].startswith("ValueError: `k_shot` must be at most the 5 normal images")
    assert table[table.status == "failed"][list(METRICS)].isna().all().all()
    (maps,) = folder.glob("maps/*.npz")
    with np.load(maps) as kept:
        assert {"0-shot", "1-shot"} < set(kept)
    text = (folder / "tables.md").read_text()
    assert "# Failed" in text
    assert "`k_shot` must be at most the 5 normal images" in text


def test_category_without_anomalous_images_has_no_metrics_rather_than_zero(
    configure: Configure, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    shutil.copytree(DATASET, root)
    for folder in [*(root / "tile" / "test").iterdir(), *(root / "tile" / "ground_truth").iterdir()]:
        if folder.name != "good":
            shutil.rmtree(folder)
    data = {
        "class_path": "MVTecAD",
        "init_args": {"root": str(root), "category": {"grid": ["bottle", "tile"]}, "num_workers": 0},
    }
    table, folder = run(configure(k_shot=[0], data=data))
    good_only, normal = table[table.category == "tile"], table[table.category == "bottle"]
    assert list(good_only.status) == ["done"]
    assert list(good_only.n_anomalous) == [0]
    assert good_only[list(METRICS)].isna().all().all()
    assert normal.image_auroc.notna().all()
    summary = (folder / "tables.md").read_text().split("# Other metrics", maxsplit=1)[0]
    assert "pixel AUROC does not exist for tile" in summary
    assert f"| {100 * normal.image_auroc.item():.1f} |" in summary
    every = (folder / "tables.md").read_text().split("# Every category")[1]
    assert "| tile | AprilGAN |" + 7 * " \N{EN DASH} |" in every


def test_full_disk_keeps_what_is_done(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps go to a device that is always full."""
    config = configure(model={"AprilGAN": OURS}, k_shot=[0, 1], shared_pass=False)
    build, opened = collecting.tempfile.TemporaryFile, []

    def second_is_full(**arguments: Any) -> Any:
        opened.extend([arguments] if arguments["dir"].name == "scratch" else [])
        return build(**arguments) if len(opened) < 2 else Path("/dev/full").open("wb", buffering=0)

    with monkeypatch.context() as patch:
        patch.setattr(collecting.tempfile, "TemporaryFile", second_is_full)
        with pytest.raises(SystemExit, match=r"(?s)No space left on device.*run the same command again"):
            run(config)
    folder = Path(OmegaConf.load(config).results)
    (kept,) = folder.glob("cells/*.json")
    assert json.loads(kept.read_text())["cell"]["k_shot"] == 0
    table, _ = run(config)
    assert list(table.status) == ["done", "done"]


def test_results_of_another_config_are_refused(configure: Configure, tmp_path: Path) -> None:
    config = configure(k_shot=[0])
    run(config)
    before = (tmp_path / "runs" / "results.csv").read_bytes()
    with pytest.raises(ValueError, match=r"`results`: .*another config \(they differ in"):
        run(config, "benchmark.seed=[7]")
    assert (tmp_path / "runs" / "results.csv").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"`results`: .* holds other files"):
        run(config, f"results={tmp_path / 'other'}")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"class_path": "AprilGun"}}, "`benchmark.model.class_path`: 'AprilGun' is no AnomalibModule"),
        ({"model": {"class_path": "os.path"}}, "is no AnomalibModule"),
        ({"data": {"class_path": "MVTecAC"}}, "`benchmark.data.class_path`: 'MVTecAC' is no AnomalibDataModule"),
        ({"model": {"class_path": "Padim", "init_args": {"depth": 3}}}, r"\(Padim\)` has no argument 'depth'"),
        ({"model": {"class_path": "Padim", "colour": 1}}, "`benchmark.model` has the unknown key 'colour'"),
        ({"model": {"class_path": "Padim", "weights": "x.pt"}}, "`benchmark.model.weights` must be 'generated'"),
        ({"model": [{"class_path": "Padim"}, {"class_path": "Padim"}]}, "2 models named 'Padim'"),
        ({"shots": [1]}, "`benchmark` has the unknown key 'shots'"),
        ({"k_shot": [-1]}, "`benchmark.k_shot` must be a whole number from 0 on, or full, got -1"),
        ({"seed": ["a"]}, "`benchmark.seed` must be a whole number from 0 on, got 'a'"),
        ({"metrics": "rough"}, "`benchmark.metrics` must be exact or streaming, got 'rough'"),
        ({"data": None}, "`benchmark.data` must be a mapping"),
    ],
)
def test_what_a_config_cannot_say(change: dict[str, Any], message: str) -> None:
    good = {"model": {"class_path": "Padim"}, "data": {"class_path": "MVTecAD", "init_args": {"category": "nut"}}}
    assert len(read_config(good | {"k_shot": ["full"]}).cells()) == 1
    with pytest.raises(ValueError, match=message):
        read_config(good | change)


def test_missing_file_and_unknown_top_key(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`--config`: there is no file"):
        run(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="`config` has the unknown key 'acelerator'"):
        run(configure(), "acelerator=cpu")


def test_grids_and_cells() -> None:
    data = {"class_path": "MVTecAD", "init_args": {"category": {"grid": ["a", "b"]}}}
    models = {"ours": {"class_path": "AprilGAN"}, "none": None, "Patchcore": {"class_path": "Patchcore"}}
    plan = read_config({"model": models, "data": data, "k_shot": [0, 1, "full"], "seed": {"grid": [3, 4]}})
    assert [tuple(cell[2:]) for cell in plan.cells() if cell.model == "ours"] == [
        (category, *setting) for category in "ab" for setting in ((0, 3), (1, 3), (1, 4))
    ]
    assert {cell.k_shot for cell in plan.cells() if cell.model == "Patchcore"} == {1, -1}
    assert {cell.model for cell in plan.cells()} == {"ours", "Patchcore"}


def test_quick_config_compares_all_models() -> None:
    plan = read_config(OmegaConf.to_container(OmegaConf.load(CONFIGS / "benchmark_built_in.yaml"))["benchmark"])
    assert {cell.model.removesuffix(" (random weights)") for cell in plan.cells()} == {"AprilGAN", *OTHERS}
    assert {entry.name for entry in plan.models if not entry.generated} == {"AprilGAN"}
    assert len(plan.cells()) == 2 * (7 + 7 + 6 + 4)


def test_all_training_images_for_models_that_learn(tmp_path: Path) -> None:
    root, results = tmp_path / "data", tmp_path / "results"
    write_mvtec_ad(root, ["bottle"], train=4)
    arguments = [f"benchmark.model.AprilGAN.init_args={json.dumps(OURS['init_args'])}", "benchmark.model.WinCLIP=null"]
    arguments += [f"benchmark.model.{name}={json.dumps(OTHERS[name])}" for name in ("PatchCore", "PaDiM")]
    arguments += [f"benchmark.data.init_args.root={root}", "benchmark.data.init_args.category=bottle"]
    arguments += ["benchmark.data.init_args.num_workers=0", "accelerator=cpu", f"results={results}"]
    main(["--config", str(CONFIGS / "benchmark.yaml"), *arguments])
    table = pd.read_csv(results / "results.csv")
    assert set(table.status) == {"done"}
    of_all = table[table.k_shot == FULL]
    assert list(of_all.model) == ["PatchCore (random weights)", "PaDiM (random weights)"]
    cells = json.loads((results / "results.json").read_text())["cells"]
    assert {cell["cell"]["k_shot"] for cell in cells} == {0, 1, 4, FULL}
    assert "| all images | PatchCore (random weights) |" in (results / "tables.md").read_text()


@pytest.mark.parametrize(
    ("dataset", "write"), [("MVTecAD", write_mvtec_ad), pytest.param("Visa", write_visa, marks=pytest.mark.slow)]
)
def test_reproduce_config_goes_through_on_a_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, write: Callable[..., None]
) -> None:
    """All categories of the real data set, in its layout; ours alone, with the built-in CLIP, loaded once."""
    loaded: list[Any] = []
    monkeypatch.setattr(preparation, "load_clip", lambda *given: loaded.append(given) or load_clip(*given))
    reference = official_code(dataset, 0)
    assert reference is not None
    root, results = tmp_path / "data", tmp_path / "results"
    write(root, list(reference.index))
    name = {"MVTecAD": "reproduce_mvtec_ad", "Visa": "reproduce_visa"}[dataset]
    arguments = [f"benchmark.model.AprilGAN.init_args={json.dumps(OURS['init_args'])}"]
    arguments += [f"benchmark.model.{other}=null" for other in OTHERS]
    arguments += [f"benchmark.data.init_args.root={root}", "benchmark.data.init_args.num_workers=0"]
    arguments += ["benchmark.k_shot=[0,1]", "benchmark.seed=[0,1]", "accelerator=cpu", f"results={results}"]
    main(["--config", str(CONFIGS / f"{name}.yaml"), *arguments])
    table = pd.read_csv(results / "results.csv")
    assert list(dict.fromkeys(table.category)) == list(reference.index)
    assert len(table) == 3 * len(reference)
    assert set(table.status) == {"done"}
    assert len(loaded) == 1
    text = (results / "tables.md").read_text()
    published = report_table(dataset).loc[(0, "APRIL-GAN"), "image_auroc"]
    assert f"## {dataset}: ours / the report's table" in text
    assert f" / {100 * published:.1f} (" in text
    assert dataset in DATASETS
