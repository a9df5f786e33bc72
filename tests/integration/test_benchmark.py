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
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from anomalib.metrics import Evaluator
from anomalib.models import Stfpm
from lightning.pytorch.accelerators import AcceleratorRegistry
from omegaconf import OmegaConf
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from anomalib_aprilgan import AprilGAN, DrawnInspection
from anomalib_aprilgan.clip.backbone import load_clip
from anomalib_aprilgan.config_files import path_of
from anomalib_aprilgan.data.references import ReferenceSource, list_references
from anomalib_aprilgan.demo import built_in
from anomalib_aprilgan.evaluation import collecting, jobs
from anomalib_aprilgan.evaluation.benchmark import main
from anomalib_aprilgan.evaluation.cells import COLUMNS, FULL
from anomalib_aprilgan.evaluation.config import Accelerator, checked
from anomalib_aprilgan.evaluation.many_banks import predict_banks
from anomalib_aprilgan.evaluation.plan import Plan, read_plan
from anomalib_aprilgan.evaluation.published import DATASETS, official_code, report_table
from anomalib_aprilgan.evaluation.truth import Frame
from anomalib_aprilgan.metrics import METRICS, ChallengeF1Max, PublishedAUPRO, measure
from anomalib_aprilgan.preparation import network as preparation

from ..conftest import DATASET
from ..generated_weights import generate
from ..stand_ins import write_data_sets, write_mvtec_ad, write_visa
from .runs import engine

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
    "WinCLIP": {"class_path": "WinClip"},
    "PatchCore": {"class_path": "Patchcore", "init_args": {"backbone": "resnet18", "layers": ["layer2"]}},
    "PaDiM": {"class_path": "Padim", "init_args": {"backbone": "resnet18", "layers": ["layer1"], "n_features": 8}},
}
Configure = Callable[..., Path]


@pytest.fixture(autouse=True)
def _generated_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    generate(monkeypatch)


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
            "benchmark": {"k_shot": [0, 1], "seed": [0], "resamples": 50, "model": {"AprilGAN": OURS}, "data": drawn}
            | benchmark,
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
    return pd.read_csv(folder / "results.csv").drop(columns=["seconds", "seconds_per_image", "peak_memory_mb"])


def plan_of(**benchmark: Any) -> Plan:
    return read_plan(checked({"benchmark": benchmark}).benchmark)


def test_models_side_by_side_leave_all_files(configure: Configure, drawn: dict[str, Any]) -> None:
    few = drawn | {"init_args": drawn["init_args"] | {"num_test": 4}}  # the others take their time
    models = {name: OTHERS[name] for name in ("WinCLIP", "PatchCore")}
    table, folder = run(configure(k_shot=[0, 2], model={"AprilGAN": OURS} | models, data=few))
    assert tuple(table.columns) == COLUMNS
    others = list(models)
    assert [(row.model, row.k_shot) for row in table.itertuples()] == [
        ("AprilGAN", 0),
        ("AprilGAN", 2),
        (others[0], 0),
        *((name, 2) for name in others),
    ]
    assert set(table.status) == {"done"}
    assert table[list(METRICS)].notna().all().all()
    assert table[list(METRICS)].stack().between(0, 1).all()
    assert set(table.n_images) == {8}
    assert set(table.n_anomalous) == {4}
    assert table.image_auroc[0] > 0.55  # the trained one
    assert (table.seconds > 0).all()
    assert (table.seconds_per_image > 0).all()
    assert (table.peak_memory_mb > 50).all()

    found = json.loads((folder / "results.json").read_text())
    few_shot = [cell for cell in found["cells"] if cell["cell"]["k_shot"] == 2]
    assert len(few_shot) == 3
    references = [cell["details"]["references"] for cell in few_shot]
    assert len(references[0]) == 2
    assert all(sorted(files) == sorted(references[0]) for files in references)  # all models had the same images
    assert len({cell["details"]["weights_sha256"] for cell in few_shot}) == 3
    assert all(cell["details"]["versions"]["anomalib"] for cell in found["cells"])
    assert found["provenance"]["config"]["benchmark"]["seed"] == [0]

    text = (folder / "tables.md").read_text()
    for heading in (
        "# Summary",
        "# Intervals",
        "# Differences on the same images",
        "# Other metrics",
        "# Every category",
    ):
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


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_killed_at_ten_moments(configure: Configure, tmp_path: Path, devices: int) -> None:
    settings = {"k_shot": [0, 1, 2, 3, 4], "seed": [0, 1, 2, 3], "shared_pass": False, "trainer": {"devices": devices}}
    _, undisturbed = run(configure("undisturbed", **settings))
    config, folder = configure("killed", **settings), tmp_path / "killed"
    command = [sys.executable, "-m", "anomalib_aprilgan.evaluation.benchmark", "--config", str(config)]
    generator, done = np.random.default_rng(0), [0]
    for _ in range(10):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(devices * generator.uniform(6, 11))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        done.append(len(list(folder.glob("cells/*.json"))))
    assert done == sorted(done)
    assert done[-1] > 0
    run(config)
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
        run(config, "--benchmark.seed=[7]")
    assert (tmp_path / "runs" / "results.csv").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"`results`: .* holds files that are not results"):
        run(config, f"--results={tmp_path / 'other'}")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]


GOOD = {"model": {"class_path": "Padim"}, "data": {"class_path": "MVTecAD", "init_args": {"category": "nut"}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"class_path": "AprilGun"}}, r"`benchmark.model \(AprilGun\)`: .*AprilGun"),
        ({"model": {"class_path": "os.path"}}, "does not correspond to a subclass of AnomalibModule"),
        ({"data": {"class_path": "MVTecAC"}}, "`benchmark.data`: .*MVTecAC"),
        ({"model": {"class_path": "Padim", "init_args": {"depth": 3}}}, "Option 'depth' is not accepted"),
        ({"model": {"class_path": "Padim", "colour": 1}}, r"`benchmark.model \(Padim\)`: .* not accepted"),
        (
            {"model": {"class_path": "Padim", "trainer": {"epochs": 1}}},
            "'trainer' does not accept option 'epochs'",
        ),
        ({"model": [{"class_path": "Padim"}, {"class_path": "Padim"}]}, "2 entries named 'Padim'. Give each a `name`"),
        ({"data": [GOOD["data"], GOOD["data"]]}, "2 entries named 'MVTecAD nut'. Give each a `name`"),
        ({"data": [{"class_path": "Folder", "init_args": {"name": "a", "normal_dir": d}} for d in "xy"]}, "named 'a'"),
        ({"data": {"class_path": "BTech", "init_args": {"category": 1}}}, r"category.*Expected.*quotation marks: '01'"),
        ({"data": GOOD["data"] | {"class_words": {"nut": 3}}}, "`benchmark.data`: .*class_words.*Got value: 3"),
        ({"data": GOOD["data"] | {"class_words": {"nutt": "nut"}}}, "has words for nutt, and none for nut"),
        ({"shots": [1]}, "'benchmark' does not accept option 'shots'"),
        ({"k_shot": [-1]}, r"benchmark.k_shot.*-1"),
        ({"k_shot": [2, 2]}, r"`k_shot` names 2 more than once, got \[2, 2\]"),
        ({"k_shot": []}, "`benchmark` asks for nothing"),
        ({"k_shot": [0]}, "asks for nothing: none of Padim can be tested with `k_shot` 0"),
        ({"seed": ["a"]}, "benchmark.seed.*'a'"),
        ({"metrics": "rough"}, r"benchmark.metrics.*\['exact', 'streaming'\].*rough"),
        ({"evaluation_size": 0}, "benchmark.evaluation_size.*v>0"),
        ({"trainer": {"max_epochs": -1}}, "benchmark.trainer.max_epochs.*v>0"),
        ({"data": None}, "'benchmark.data' is required"),
        ({"data": [3]}, "benchmark.data"),
        ({"data": {"root": "x"}}, "`benchmark.data` must be a mapping with `class_path`"),
    ],
)
def test_what_a_config_cannot_say(change: dict[str, Any], message: str) -> None:
    assert len(plan_of(**GOOD | {"k_shot": ["full"]}).cells()) == 1
    with pytest.raises(ValueError, match=message):
        plan_of(**GOOD | change)


def test_every_accelerator_that_a_config_may_name_is_known() -> None:
    assert set(get_args(Accelerator)) - {"auto"} <= set(AcceleratorRegistry.available_accelerators())


def test_missing_file_and_unknown_top_key(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`--config`: there is no file"):
        run(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="`config`: Option 'acelerator' is not accepted"):
        run(configure(), "--acelerator=cpu")


def test_grids_and_cells() -> None:
    data = {"class_path": "MVTecAD", "init_args": {"category": {"grid": ["a", "b"]}}}
    models = {"ours": {"class_path": "AprilGAN"}, "none": None, "Patchcore": {"class_path": "Patchcore"}}
    plan = plan_of(model=models, data=data, k_shot=[0, 1, "full"], seed={"grid": [3, 4]})
    assert [tuple(cell[2:5]) for cell in plan.cells() if cell.model == "ours"] == [
        (category, *setting) for category in "ab" for setting in ((0, 3), (1, 3), (1, 4))
    ]
    assert {cell.k_shot for cell in plan.cells() if cell.model == "Patchcore"} == {1, -1}
    assert {cell.model for cell in plan.cells()} == {"ours", "Patchcore"}


def test_quick_config_is_offline_and_compares_three_models() -> None:
    config = OmegaConf.to_container(OmegaConf.load(path_of("benchmark/built_in")), resolve=True)
    plan = read_plan(checked(config).benchmark)
    assert [entry.name for entry in plan.models] == ["AprilGAN", "PatchCore, untrained", "PaDiM, untrained"]
    assert len(plan.cells()) == 2 * (7 + 6 + 4)


@pytest.mark.slow
def test_all_training_images_for_models_that_learn(tmp_path: Path) -> None:
    root, results = tmp_path / "data", tmp_path / "results"
    write_mvtec_ad(root, ["bottle"], train=4)
    arguments = [
        f"--benchmark.model.AprilGAN.init_args={json.dumps(OURS['init_args'])}",
        "--benchmark.model.WinCLIP=null",
    ]
    arguments += [f"--benchmark.model.{name}={json.dumps(OTHERS[name])}" for name in ("PatchCore", "PaDiM")]
    arguments += [f"--benchmark.data.init_args.root={root}", "--benchmark.data.init_args.category=bottle"]
    arguments += ["--benchmark.data.init_args.num_workers=0", "--accelerator=cpu", f"--results={results}"]
    main(["--config", "benchmark/compare", *arguments])
    table = pd.read_csv(results / "results.csv")
    assert set(table.status) == {"done"}
    of_all = table[table.k_shot == FULL]
    assert list(of_all.model) == ["PatchCore", "PaDiM"]
    cells = json.loads((results / "results.json").read_text())["cells"]
    assert {cell["cell"]["k_shot"] for cell in cells} == {0, 1, 4, FULL}
    assert "| all images | PatchCore |" in (results / "tables.md").read_text()


@pytest.mark.parametrize(("dataset", "write"), [("MVTecAD", write_mvtec_ad), ("Visa", write_visa)])
@pytest.mark.slow
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
    arguments = [f"--benchmark.model.AprilGAN.init_args={json.dumps(OURS['init_args'])}"]
    arguments += [f"--benchmark.model.{other}=null" for other in OTHERS]
    arguments += [f"--benchmark.data.init_args.root={root}", "--benchmark.data.init_args.num_workers=0"]
    arguments += ["--benchmark.k_shot=[0,1]", "--benchmark.seed=[0,1]", "--accelerator=cpu", f"--results={results}"]
    main(["--config", f"benchmark/{name}", *arguments])
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


class Recorded:
    """Raw maps and what was measured, of every measurement in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.all: list[dict[str, Any]] = []
        monkeypatch.setattr(collecting, "measure", self.measure)

    def measure(self, masks: Any, maps: Any, labels: Any, scores: Any) -> dict[str, float]:
        self.all.append({"masks": masks, "maps": maps, "labels": labels, "scores": scores})
        return measure(masks, maps, labels, scores)


def write_folders(root: Path, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """``Folder`` entries of products of a few random pictures of one size, with masks."""
    entries = []
    for name, size in sizes.items():
        generator = np.random.default_rng(size)
        for kind in ("good", "bad", "mask"):
            (root / name / kind).mkdir(parents=True)
        for kind, number in (("good", 7), ("bad", 5)):
            for index in range(number):
                pixels = generator.integers(90, 120, (size, size, 3)).astype(np.uint8)
                if kind == "bad":
                    top, left = generator.integers(0, size // 2, 2)
                    pixels[top : top + size // 4, left : left + size // 3] += 60
                    mask = np.zeros((size, size), np.uint8)
                    mask[top : top + size // 4, left : left + size // 3] = 255
                    Image.fromarray(mask).save(root / name / "mask" / f"{index}.png")
                Image.fromarray(pixels).save(root / name / kind / f"{index}.png")
        arguments = {"name": name, "root": str(root / name), "normal_dir": "good", "abnormal_dir": "bad"}
        arguments |= {"mask_dir": "mask", "num_workers": 0, "eval_batch_size": 3}
        entries.append({"class_path": "Folder", "init_args": arguments})
    return entries


@pytest.mark.thorough
def test_any_data_and_any_model_in_one_table(
    configure: Configure, drawn: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two folders, a grid over seeds, four models: every figure against scikit-learn on the raw maps."""
    recorded = Recorded(monkeypatch)
    dino = {"class_path": "AnomalyDINO"}
    monkeypatch.setattr(timm, "create_model", small_dino(timm.create_model))
    grid = drawn | {"init_args": drawn["init_args"] | {"num_test": 3, "seed": {"grid": [300, 301]}}}
    data = [*write_folders(tmp_path / "parts", {"lids": 64, "rings": 80}), grid]
    models = {"AprilGAN": OURS, "PatchCore": OTHERS["PatchCore"], "PaDiM": OTHERS["PaDiM"], "AnomalyDINO": dino}
    config = configure(model=models, data=data, k_shot=[0, 2], evaluation_size=[48, 56])
    table, folder = run(config)
    names = ["lids", "rings", "DrawnInspection seed=300", "DrawnInspection seed=301"]
    assert list(dict.fromkeys(table.dataset)) == names
    assert len(table) == 4 * 5
    assert set(table.status) == {"done"}
    assert set(table.evaluation_size) == {"48 x 56"}
    assert set(table.datamodule) == {"Folder", "DrawnInspection"}
    assert table.groupby("dataset").test_files.nunique().eq(1).all()
    assert table.test_files.nunique() == 3  # the drawn ones differ in their pictures, not in the names of their files
    assert not table.duplicated(["dataset", "image_auroc", "pixel_auroc", "pixel_ap", "aupro"]).any()
    order = [row for name in names for row in table[table.dataset == name].itertuples()]
    assert len(recorded.all) == len(order)
    for row, arrays in zip(order, recorded.all, strict=True):
        assert all(one.shape == (48, 56) for one in [*arrays["masks"], *arrays["maps"]])
        truth, pixels = (np.concatenate([one.ravel() for one in arrays[key]]) for key in ("masks", "maps"))
        assert row.n_images == len(arrays["labels"])
        assert row.pixel_auroc == pytest.approx(roc_auc_score(truth, pixels), abs=1e-6)
        assert row.pixel_ap == pytest.approx(average_precision_score(truth, pixels), abs=1e-6)
        assert row.image_auroc == pytest.approx(roc_auc_score(arrays["labels"], arrays["scores"]), abs=1e-6)
    for name in names:  # the truth is the same for all models
        first, *others = [
            arrays["masks"] for row, arrays in zip(order, recorded.all, strict=True) if row.dataset == name
        ]
        assert all(np.array_equal(one, other) for masks in others for one, other in zip(first, masks, strict=True))
    text = (folder / "tables.md").read_text()
    assert "## lids (1 category, 1 seed; pixels at 48 x 56;" in text
    assert "| 2-shot | AprilGAN - PatchCore |" in text
    assert (folder / "heatmaps_AprilGAN-lids.png").exists()


def small_dino(create: Callable[..., Any]) -> Callable[..., Any]:
    """``timm.create_model`` whose DINOv2 is narrow."""

    def build(name: str, **arguments: Any) -> Any:
        narrow = {"embed_dim": 48, "num_heads": 2} if "dinov2" in name else {}
        return create(name, **arguments | narrow)

    return build


def test_models_are_tested_on_the_same_images_of_data_that_is_split_at_random(
    configure: Configure, tmp_path: Path
) -> None:
    """`Folder` without normal test images takes some of its training images, at random."""
    data = write_folders(tmp_path / "parts", {"lids": 64})
    models = {"AprilGAN": OURS, "PaDiM": OTHERS["PaDiM"]}
    first, folder = run(configure(model=models, data=data, k_shot=[0, 2], seed=[0, 1]))
    assert first.test_files.nunique() == 1
    assert len(list(folder.glob("maps/*.npz"))) == 1
    again, _ = run(configure("again", model=models, data=data, k_shot=[0, 2], seed=[0, 1]))
    pd.testing.assert_frame_equal(
        *(table.drop(columns=["seconds", "seconds_per_image", "peak_memory_mb"]) for table in (first, again))
    )


def test_pixels_are_measured_at_the_size_of_the_ground_truth(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(monkeypatch)
    data = write_folders(tmp_path / "parts", {"lids": 64})
    Image.open(tmp_path / "parts" / "lids" / "good" / "0.png").resize((50, 70)).save(
        tmp_path / "parts" / "lids" / "good" / "0.png"
    )
    models = {"AprilGAN": OURS, "PaDiM": OTHERS["PaDiM"]}
    table, folder = run(configure(model=models, data=data, k_shot=[2]))
    assert set(table.evaluation_size) == {"ground truth"}
    for arrays in recorded.all:
        assert {mask.shape for mask in arrays["masks"]} <= {(64, 64), (70, 50)}
        assert [mask.shape for mask in arrays["masks"]] == [one.shape for one in arrays["maps"]]
    assert "pixels at the size of the ground truth" in (folder / "tables.md").read_text()


def test_what_a_crop_leaves_out_counts_as_normal() -> None:
    """A model that looks at the centre alone: its map belongs in the middle of the image."""
    pre_processor = SimpleNamespace(transform=Compose([Resize((80, 100)), CenterCrop((40, 60))]))
    anomaly_map = np.full((20, 30), 5, np.float32)
    anomaly_map[0, 0] = 1
    fitted = Frame.of(pre_processor).fitted(anomaly_map, (160, 200))  # type: ignore[arg-type]
    assert fitted.shape == (160, 200)
    assert fitted[80, 100] == 5
    assert np.allclose(fitted[:38], 1)
    assert np.allclose(fitted[:, :38], 1)
    rows, columns = np.nonzero(fitted > 3)
    assert (rows.min(), rows.max(), columns.max()) == pytest.approx((40, 119, 159), abs=1)
    assert np.array_equal(Frame().fitted(anomaly_map, (20, 30)), anomaly_map)


ANOMALIB = """
accelerator:
  - cpu
benchmark:
  seed: 42
  model:
    class_path:
      grid: [Padim, Patchcore]
  data:
    class_path: MVTecAD
    init_args:
      root: {root}
      category:
        grid:
          - bottle
"""


def test_a_config_of_anomalib_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mvtec_ad(tmp_path / "data", ["bottle"])
    path = tmp_path / "anomalib.yaml"
    path.write_text(ANOMALIB.format(root=tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    main(["--config", str(path), "--benchmark.data.init_args.num_workers=0"])
    table = pd.read_csv(tmp_path / "results" / "benchmark" / "results.csv")
    assert [(row.model, row.category, row.k_shot, row.seed) for row in table.itertuples()] == [
        (model, "bottle", FULL, 42) for model in ("Padim", "Patchcore")
    ]
    assert set(table.status) == {"done"}
    assert set(table.accelerator) == {"cpu"}
    assert "| all images | Padim |" in capsys.readouterr().out


def test_an_accelerator_that_is_not_there(configure: Configure) -> None:
    missing = next(
        name for name in ("mps", "xpu", "cuda") if not AcceleratorRegistry[name]["accelerator"].is_available()
    )
    table, folder = run(configure(k_shot=[0]), f"--accelerator=[{missing},cpu]")
    assert set(table.accelerator) == {"cpu"}
    assert f"This machine has no {missing}: its cells were left out." in (folder / "tables.md").read_text()
    with pytest.raises(ValueError, match=f"`accelerator`: this machine has none of {missing}. Ask for cpu."):
        run(configure("none", k_shot=[0]), f"--accelerator={missing}")


@pytest.mark.slow
def test_cells_in_parallel_equal_one_after_the_other(configure: Configure) -> None:
    settings = {"k_shot": [0, 1, 9], "shared_pass": False}
    tables = []
    for name, devices in (("serial", 1), ("parallel", 2)):
        with pytest.raises(SystemExit, match="1 of 3 cells failed"):
            run(configure(name, **settings, trainer={"devices": devices}))
        tables.append(table_without_durations(Path(OmegaConf.load(configure(name, **settings)).results)))
    pd.testing.assert_frame_equal(*tables, check_exact=True)


@pytest.mark.parametrize(
    ("given", "shared"),
    [({}, True), ({"roi": [0, 0, 50, 50]}, False), ({"outputs": ["regions"]}, False), ({"outputs": []}, True)],
)
def test_what_one_pass_cannot_serve_is_run_one_by_one(
    drawn: dict[str, Any], given: dict[str, Any], shared: bool
) -> None:
    ours = OURS | {"init_args": OURS["init_args"] | given}
    plan = plan_of(model={"AprilGAN": ours}, data=drawn, k_shot=[0, 1])
    assert [entry.is_shared(data) for entry, data, _ in plan.groups("cpu")] == [shared]


def test_training_as_the_config_says(
    configure: Configure, drawn: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[int, str]] = []
    finished = Stfpm.on_train_end if hasattr(Stfpm, "on_train_end") else None
    monkeypatch.setattr(
        Stfpm,
        "on_train_end",
        lambda self: (steps.append((self.global_step, str(self.trainer.precision))), finished and finished(self))[1],
    )
    # As few and small images as can be: a CPU without instructions for bf16 takes seconds for each.
    small = {"backbone": "resnet18", "layers": ["layer1"], "pre_processor": False}
    few = drawn | {"init_args": drawn["init_args"] | {"num_train": 2, "num_test": 2, "image_size": 32}}
    stfpm = {"class_path": "Stfpm", "init_args": small}
    model = {"short": stfpm | {"trainer": {"max_steps": 1}}, "longer": stfpm}
    trainer = {"max_epochs": 2, "precision": "bf16-mixed"}
    table, _ = run(configure(model=model, data=few, k_shot=["full"], trainer=trainer))
    assert list(table.status) == ["done", "done"]
    assert steps == [(1, "bf16-mixed"), (2, "bf16-mixed")]


def test_words_for_categories_that_are_no_words(configure: Configure, drawn: dict[str, Any]) -> None:
    named, words = configure("named", k_shot=[0]), {"nut": "xylophone"}
    table, _ = run(named)
    other, _ = run(configure("words", k_shot=[0], data=drawn | {"class_words": words}))
    ours = OURS | {"init_args": OURS["init_args"] | {"class_name": "xylophone"}}
    same, _ = run(configure("same", k_shot=[0], model={"AprilGAN": ours}))
    assert other.pixel_ap[0] == same.pixel_ap[0]
    assert other.pixel_ap[0] != table.pixel_ap[0]


def test_several_classes_in_one_entry(configure: Configure, drawn: dict[str, Any]) -> None:
    """Every image under its own class; each has references of its own."""
    parts = [
        drawn | {"init_args": drawn["init_args"] | {"category": name, "num_test": 3}} for name in ("nut", "leather")
    ]
    data = {"class_path": "MultiCategoryData", "init_args": {"datamodules": parts, "num_workers": 0}}
    data |= {"name": "both", "class_words": {"nut": "nut", "leather": "leather"}}
    table, folder = run(configure(k_shot=[0, 1], data=data))
    assert list(table.status) == ["done", "done"]
    assert set(table.n_images) == {12}
    assert table.image_auroc.nunique() == 2
    assert "| 1-shot | AprilGAN |" in (folder / "tables.md").read_text()


def test_versions_are_those_a_cell_was_made_with(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(k_shot=[0, 9], shared_pass=False)
    monkeypatch.setattr(jobs, "versions", lambda: {"torch": "1.0"})
    with pytest.raises(SystemExit):
        run(config)
    path = next((Path(OmegaConf.load(config).results) / "cells").glob("*.json"))
    monkeypatch.setattr(jobs, "versions", lambda: {"torch": "2.0"})
    monkeypatch.setattr(ReferenceSource, "draw", lambda _: list_references(DATASET / "tile" / "train")[:1])
    run(config)
    folder = path.parents[1]
    cells = json.loads((folder / "results.json").read_text())["cells"]
    assert [cell["details"]["versions"]["torch"] for cell in cells] == ["1.0", "2.0"]
    assert "The cells were made with torch 1.0 and 2.0" in (folder / "tables.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Dinomaly", "AnomalyVFM"])
def test_large_models_of_anomalib(configure: Configure, drawn: dict[str, Any], name: str) -> None:
    arguments = {"encoder_name": "vit_small_patch14_reg4_dinov2"} if name == "Dinomaly" else {}
    model = {"class_path": name, "init_args": arguments, "trainer": {"max_steps": 1}}
    few = drawn | {"init_args": drawn["init_args"] | {"num_test": 2, "train_batch_size": 2}}
    table, _ = run(configure(model=model, data=few))
    assert list(table.status) == ["done"]
    assert list(table.k_shot) == ([1] if name == "Dinomaly" else [0])
    assert table.pixel_auroc.between(0, 1).all()


@pytest.mark.thorough
def test_the_data_sets_of_anomalib_are_rows_ready_to_run(tmp_path: Path) -> None:
    root, results = tmp_path / "data", tmp_path / "results"
    layouts = write_data_sets(root)
    path = path_of("benchmark/data_sets")
    config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    plan = read_plan(checked(config).benchmark)
    assert list(dict.fromkeys(entry.name for entry in plan.data)) == list(layouts)
    assert len(plan.data) == 6 + 3 + 5 + 8 + 30 + 1 + 1
    assert {entry.category: entry.class_words for entry in plan.data if entry.name == "BTAD"}["02"] == {"02": "wood"}
    others = ("WinCLIP", "AnomalyVFM", "AnomalyDINO", "PatchCore", "PaDiM", "Dinomaly")
    arguments = [f"--benchmark.model.{name}=null" for name in others]
    arguments += [f"--benchmark.model.AprilGAN.init_args={json.dumps(OURS['init_args'])}"]
    for name, (folder, category) in layouts.items():
        arguments += [f"--benchmark.data.{name}.init_args.root={root / folder}"]
        arguments += [f"--benchmark.data.{name}.init_args.num_workers=0"]
        arguments += [f"--benchmark.data.{name}.init_args.category='{category}'"] if category else []
    main(["--config", str(path), *arguments, "--benchmark.k_shot=0", f"--results={results}", "--accelerator=cpu"])
    table = pd.read_csv(results / "results.csv", keep_default_na=False)
    assert list(table.dataset) == list(layouts)
    assert set(table.status) == {"done"}
    assert table.pixel_ap.between(0, 1).all()
    assert set(table.n_anomalous) == {1, 2}


def test_metrics_in_an_evaluator_are_those_of_the_table(
    configure: Configure, drawn: dict[str, Any], tmp_path: Path
) -> None:
    table, _ = run(configure(k_shot=[0]))
    evaluator = Evaluator(test_metrics=[PublishedAUPRO(), ChallengeF1Max(prefix="image_pixel_")])
    model = AprilGAN(**OURS["init_args"], evaluator=evaluator, post_processor=False)
    (found,) = engine(tmp_path).test(model=model, datamodule=DrawnInspection(**drawn["init_args"]), verbose=False)
    assert found["PublishedAUPRO"] == pytest.approx(table.aupro[0], abs=1e-4)
    assert found["image_pixel_ChallengeF1Max"] == pytest.approx(table.challenge_f1_max[0], abs=1e-4)


def test_banks_that_are_not_plain_ones_are_measured_one_by_one(configure: Configure) -> None:
    """Also without references, where what is about them does not count."""
    plain, _ = run(configure("plain", k_shot=[0, 3], model={"AprilGAN": OURS}))
    for name, options in {
        "bounded": {"memory_size": 40, "memory_dtype": "float16"},
        "unlabelled": {"references_unlabelled": True, "lowest_share": 1.0},
    }.items():
        ours = OURS | {"init_args": OURS["init_args"] | options}
        found, _ = run(configure(name, k_shot=[0, 3], model={"AprilGAN": ours}))
        both = [table.set_index("k_shot").pixel_auroc for table in (found, plain)]
        assert both[0][0] == pytest.approx(both[1][0], abs=1e-6)
        assert abs(both[0][3] - both[1][3]) > 1e-6
