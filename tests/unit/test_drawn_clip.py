"""The small CLIP's training: true captions, losses with the right zeroes, a short run that learns and can be loaded."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from anomalib_aprilgan.clip.architecture import ClipArchitecture
from anomalib_aprilgan.clip.backbone import load_clip
from anomalib_aprilgan.clip.prompts import ANOMALOUS_STATES, NORMAL_STATES, TEMPLATES, PromptEnsemble
from anomalib_aprilgan.demo import built_in
from anomalib_aprilgan.demo.drawing import CATEGORIES, DEFECTS, INVENTIONS, OBJECTS, TEXTURES, draw_twins
from anomalib_aprilgan.demo.drawn_clip import captions, pretrain
from anomalib_aprilgan.demo.drawn_clip import pictures as pictures_module
from anomalib_aprilgan.demo.drawn_clip.captions import Caption, draw_caption, draw_state_sentences
from anomalib_aprilgan.demo.drawn_clip.muon import Muon, orthogonalise
from anomalib_aprilgan.demo.drawn_clip.objectives import also_fits, contrastive_loss, patch_loss, ranking_loss
from anomalib_aprilgan.demo.drawn_clip.pictures import crop, draw_pictures, vary
from anomalib_aprilgan.demo.drawn_clip.pretrain import (
    CAPTIONED_CATEGORIES,
    DRAWN_DEFECTS,
    UNSEEN_CATEGORIES,
    UNSEEN_DEFECTS,
    train,
)
from anomalib_aprilgan.demo.drawn_clip.trainer import Recipe, Trainer


@pytest.fixture(scope="module")
def pictures():
    return draw_pictures(("pill", "wood"), ("hole", "scratch"), 6, 2, 5, 96, progress=False)


@pytest.fixture(scope="module")
def architecture():
    return ClipArchitecture.load(built_in.ARCHITECTURE, (96, 96), None)


def test_enough_stays_out_of_training():
    assert set(CAPTIONED_CATEGORIES) | set(UNSEEN_CATEGORIES) == set(CATEGORIES)
    assert set(DRAWN_DEFECTS) | set(UNSEEN_DEFECTS) == set(DEFECTS)
    assert len(set(UNSEEN_CATEGORIES) & set(TEXTURES)) >= 2
    assert len(set(UNSEEN_CATEGORIES) & set(OBJECTS)) >= 2
    assert {"rotated_patch", "dent"} <= set(UNSEEN_DEFECTS)  # a structural one and one of the surface


def test_no_noun_names_a_drawn_category():
    nouns = captions.GENERIC_NOUNS + captions.UNRELATED_NOUNS
    assert not set(nouns) & set(CATEGORIES)
    assert len(set(nouns)) == len(nouns)
    assert set(captions.DEFECT_STATES) == set(DEFECTS)


def test_captions_are_true_of_their_picture_and_read_like_the_prompts():
    generator = np.random.default_rng(0)
    known = {sentence for states in PromptEnsemble().sentences("wood") for sentence in states}
    drawn = [draw_caption("wood", kind, generator) for kind in (None, "crack") for _ in range(300)]
    assert all(caption.fits("wood", None) for caption in drawn[:300])
    assert all(caption.fits("wood", "crack") for caption in drawn[300:])
    own = [caption for caption in drawn if caption.category == "wood" and caption.kind is None]
    assert all(caption.text in known for caption in own)
    assert 0.4 < np.mean([caption.category == "wood" for caption in drawn]) < 0.7
    assert any("cracked" in caption.text for caption in drawn[300:])
    assert not any("crack" in caption.text for caption in drawn[:300])


@pytest.mark.parametrize(
    ("caption", "fits"),
    [
        (Caption("a photo of a pill.", "pill", None, None), {("pill", None), ("pill", "hole")}),
        (Caption("a photo of a flawless thing.", None, False, None), {("pill", None), ("nut", None)}),
        (Caption("a photo of a damaged pill.", "pill", True, None), {("pill", "hole")}),
        (Caption("a photo of a scratched thing.", None, True, "scratch"), set()),
    ],
)
def test_what_a_caption_fits(caption, fits):
    shown = [("pill", None), ("pill", "hole"), ("nut", None)]
    assert {picture for picture in shown if caption.fits(*picture)} == fits


def test_state_sentences_are_of_the_ensemble_and_use_many_states():
    normal, anomalous = PromptEnsemble().sentences("thing")
    drawn = draw_state_sentences("thing", 7, np.random.default_rng(1))
    assert [len(sentences) for sentences in drawn] == [7, 7]
    assert set(drawn[0]) <= set(normal)
    assert set(drawn[1]) <= set(anomalous)
    assert {normal.index(sentence) // len(TEMPLATES) for sentence in drawn[0]} == set(range(len(NORMAL_STATES)))
    assert {anomalous.index(sentence) // len(TEMPLATES) for sentence in drawn[1]} == set(range(len(ANOMALOUS_STATES)))


def test_drawn_pictures_are_the_twins_of_their_names(pictures):
    assert len(pictures) == 12
    assert pictures.categories == ("pill", "pill", "wood", "wood") * 3
    assert Counter(zip(pictures.categories, pictures.kinds, strict=True)) == {
        (category, kind): 3 for category in ("pill", "wood") for kind in ("hole", "scratch")
    }
    second_of_second_wood = draw_twins("wood", 6, 1, pictures.kinds[7], 96)
    np.testing.assert_array_equal(pictures.bad[7], second_of_second_wood.bad)
    np.testing.assert_array_equal(pictures.mask[7], second_of_second_wood.mask)


def test_a_category_named_twice_has_twice_as_many_products():
    drawn = draw_pictures(("pill", "wood", "wood"), ("hole",), 6, 1, 5, 32, progress=False)
    assert Counter(drawn.categories) == {"pill": 2, "wood": 4}
    wood = [good.tobytes() for good, category in zip(drawn.good, drawn.categories, strict=True) if category == "wood"]
    assert len(set(wood)) == 4


def test_pictures_do_not_depend_on_who_draws_them(monkeypatch):
    # Threads instead of processes, which would import everything first.
    monkeypatch.setattr(pictures_module, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers))
    alone, shared = (
        draw_pictures(("pill", "wood"), ("hole",), 125, 2, 5, 32, workers=workers, progress=False) for workers in (1, 2)
    )
    assert len(alone) == 250  # more than one worker gets at a time
    for name in ("good", "bad", "mask"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(shared, name))
    assert (alone.categories, alone.kinds) == (shared.categories, shared.kinds)


def test_every_category_has_all_kinds_equally_often():
    drawn = draw_pictures(("pill", "wood"), ("hole", "scratch", "stain"), 6, 2, 5, 32, progress=False)
    assert set(Counter(zip(drawn.categories, drawn.kinds, strict=True)).values()) == {2}


def test_windows_show_some_of_the_defect(pictures):
    windows = crop(pictures, np.arange(12), 64, np.random.default_rng(0))
    assert windows.good.shape == (12, 64, 64, 3)
    assert windows.mask.any(axis=(1, 2)).all()
    np.testing.assert_array_equal(windows.mask, (windows.good != windows.bad).any(axis=-1))
    np.testing.assert_array_equal(crop(pictures, np.arange(12), 96, np.random.default_rng(0)).good, pictures.good)


def test_variation_keeps_twins_and_mask_together(pictures):
    good, bad = (torch.from_numpy(array).permute(0, 3, 1, 2) / 255.0 for array in (pictures.good, pictures.bad))
    mask = torch.from_numpy(pictures.mask).float()
    for seed in range(8):
        varied = vary(good, bad, mask, torch.Generator().manual_seed(seed))
        changed = (varied[0] != varied[1]).any(dim=1)
        assert not (changed & (varied[2] == 0)).any()
        assert changed.sum() > 0.7 * mask.sum()  # clipping hides a little
        assert not torch.equal(varied[0], good)


def test_patch_loss_of_a_worked_case():
    mask = torch.zeros(1, 16, 16)
    mask[0, :8, :8] = 1.0  # patch 0 is defective
    mask[0, 8, 8] = 1.0  # patch 3 by one pixel of 64: neither
    logits = torch.zeros(2, 4, 2)
    logits[:, :, 0] = 50.0
    logits[1, 0] = torch.tensor([0.0, 50.0])
    assert patch_loss(logits, mask) < 1e-6
    logits[1, 3] = torch.tensor([0.0, 50.0])
    assert patch_loss(logits, mask) < 1e-6
    logits[1, 0] = torch.tensor([50.0, 0.0])
    assert patch_loss(logits, mask) == pytest.approx(12.5)  # half of the half about the defect's place
    logits[0, 1] = torch.tensor([0.0, 50.0])
    assert patch_loss(logits, mask) == pytest.approx(12.5 + 6.25)  # one of four sound patches elsewhere


def test_patch_loss_counts_every_pair_the_same():
    mask = torch.zeros(2, 16, 16)
    mask[0, :8, :8] = mask[1, :, :8] = 1.0  # one patch, two patches
    logits = torch.tensor([50.0, 0.0]).expand(4, 4, 2)
    assert patch_loss(logits, mask) == patch_loss(logits[:2], mask[:1]) == pytest.approx(12.5)


def test_ranking_loss_compares_the_pictures_of_a_product():
    margins = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    pairs = [
        np.log1p(np.exp(float(margins[0, product, good] - margins[1, product, bad])))
        for product in range(3)
        for good in range(4)
        for bad in range(4)
    ]
    assert ranking_loss(margins) == pytest.approx(np.mean(pairs), rel=1e-5)
    shifted = margins + torch.tensor([5.0, -7.0, 0.0])[:, None]  # a product whose pictures all look odd
    torch.testing.assert_close(ranking_loss(shifted), ranking_loss(margins))
    perfect = torch.stack([torch.full((3, 4), -50.0), torch.full((3, 4), 50.0)])
    assert ranking_loss(perfect) < 1e-6


def test_contrastive_loss_leaves_out_what_fits_by_chance():
    logits = torch.tensor([[2.0, 9.0], [0.5, 1.0]])
    ignored = torch.tensor([[False, True], [False, False]])
    rows = torch.tensor([0.0, torch.log1p(torch.exp(torch.tensor(-0.5)))]).mean()
    columns = torch.tensor([torch.log1p(torch.exp(torch.tensor(-1.5))), 0.0]).mean()
    assert contrastive_loss(logits, ignored) == pytest.approx(float(rows + columns) / 2)


def test_also_fits_is_about_other_pictures():
    shown = [("pill", None), ("pill", "hole")]
    told = [Caption("a photo of a pill.", "pill", None, None), Caption("a photo of a damaged thing.", None, True, None)]
    assert also_fits(told, shown).tolist() == [[False, False], [True, False]]


def test_orthogonalised_matrices_have_singular_values_near_one():
    matrices = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_muon_goes_downhill():
    target = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.nn.Parameter(torch.zeros(6, 4))
    optimizer = Muon([weight], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (weight - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.02 * target.square().mean()


@pytest.mark.thorough
def test_short_training_lowers_its_losses_and_is_repeatable(pictures, architecture):
    recipe = Recipe(steps=24, per_product=2, phases=((0.5, 32, 6), (1.0, 64, 3)))
    runs = []
    for steps in (24, 2):
        trainer = Trainer(architecture, recipe, pictures, torch.device("cpu"))
        runs.append([trainer.step(number) for number in range(steps)])
    assert runs[0][:2] == runs[1]
    assert [number for number, losses in enumerate(runs[0]) if "contrast" in losses] == [0, 4, 8, 12, 16, 20]
    first, last = (
        {name: np.mean([step[name] for step in part]) for name in ("image", "ranking", "patch")}
        for part in (runs[0][:4], runs[0][-4:])
    )
    assert last["patch"] < 0.8 * first["patch"]
    assert last["image"] < 0.8 * first["image"]
    assert last["ranking"] < first["ranking"]


def test_inventions_come_later(architecture, monkeypatch):
    pictures = draw_pictures(("pill", INVENTIONS[0]), ("hole",), 8, 1, 5, 32, progress=False)
    recipe = Recipe(steps=4, per_product=1, phases=((1.0, 32, 4),), inventions_from=0.5)
    trainer = Trainer(architecture, recipe, pictures, torch.device("cpu"))
    shown, losses = [], trainer.losses
    monkeypatch.setattr(
        trainer, "losses", lambda twins, *, contrast: shown.append(twins.categories) or losses(twins, contrast=contrast)
    )
    for number in range(4):
        trainer.step(number)
    assert set(shown[0] + shown[1]) == {"pill"}
    assert Counter(shown[2] + shown[3]) == {"pill": 4, INVENTIONS[0]: 4}  # all of them before any comes again


def test_kept_is_the_running_mean_of_the_weights(pictures, architecture):
    recipe = Recipe(steps=3, per_product=2, phases=((1.0, 32, 2),), decay=0.75)
    trainer = Trainer(architecture, recipe, pictures, torch.device("cpu"))
    history = []
    for number in range(3):
        trainer.step(number)
        history.append(trainer.clip.visual.proj.detach().clone())
    expected = 0.75 * (0.75 * history[0] + 0.25 * history[1]) + 0.25 * history[2]
    torch.testing.assert_close(trainer.kept.visual.proj.detach(), expected)
    assert not torch.equal(history[1], history[2])


def test_training_writes_loadable_weights_and_a_log(tmp_path, architecture, monkeypatch):
    monkeypatch.setattr(pretrain, "CATEGORIES", ("nut", "pill"))
    monkeypatch.setattr(pretrain, "UNSEEN_CATEGORIES", ("nut",))
    monkeypatch.setattr(pretrain, "CAPTIONED_CATEGORIES", ("pill",))
    out = tmp_path / "clip.safetensors"
    recipe = Recipe(steps=2, products=2, per_product=2, phases=((0.5, 32, 1), (1.0, 96, 1)))
    log = train(recipe, out)
    assert json.loads(out.with_suffix(".log.json").read_text())["curve"] == log["curve"]
    assert set(log["zero_shot_image_auroc"]) == {"nut", "pill"}
    assert set(tmp_path.iterdir()) == {out, out.with_suffix(".log.json")}  # nothing half-written stays behind
    clip = load_clip(architecture, str(out))
    states = clip.encode_states(["a photo of a pill."], ["a photo of a damaged pill."])
    torch.testing.assert_close(states.norm(dim=0), torch.ones(2))
    assert {value.dtype for value in load_file(out).values()} == {torch.float16}
    assert out.stat().st_size < 8_000_000


def test_training_command(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(pretrain, "train", lambda *arguments, **options: asked.append((arguments, options)))
    out = tmp_path / "clip.safetensors"
    pretrain.main(["--steps", "9", "--seed", "3", "--products", "8", "--workers", "2", "--out", str(out)])
    assert asked == [((Recipe(steps=9, seed=3, products=8), out), {"workers": 2})]
    with pytest.raises(SystemExit):
        pretrain.main(["--out", "clip.pt"])
