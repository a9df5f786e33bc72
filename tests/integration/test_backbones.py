"""Every architecture that open_clip lists is built and tapped, without numbers; the list of them, and its command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from anomalib_aprilgan.clip import catalogue, library
from anomalib_aprilgan.clip.catalogue import Backbone, backbones
from anomalib_aprilgan.command import main
from anomalib_aprilgan.commands.backbones import markdown

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "backbones.md"
# One of each kind of tower.
SOME = ["ViT-B-32", "RN50x4", "coca_ViT-B-32", "ViT-B-16-SigLIP2", "MobileCLIP2-S0", "roberta-ViT-B-32"]


@pytest.fixture(scope="module", autouse=True)
def without_cache() -> Iterator[None]:
    """What is in a developer's own Hugging Face cache changes nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "try_to_load_from_cache", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def everything(without_cache: None) -> list[Backbone]:
    del without_cache
    return list(backbones())


@pytest.mark.slow
@pytest.mark.timeout(900)  # some 150 architectures are built
class TestEverything:
    def test_every_tower_is_tapped(self, everything: list[Backbone]) -> None:
        assert [one.name for one in everything] == library.model_names()
        for one in everything:
            assert one.stages >= 4
            assert min(one.image_size) // one.patch >= 4  # cells of the coarsest grid
            assert one.gflops > 0.5

    def test_most_can_be_used(self, everything: list[Backbone]) -> None:
        usable = [one for one in everything if not one.refused]
        assert len(everything) >= 144
        assert len(usable) >= 130
        assert sum(len(one.weights) for one in usable) >= 180
        assert {one.refused.partition(" of ")[0] for one in everything} <= {"", "needs the configuration"}

    def test_page_shows_what_the_command_prints(self, everything: list[Backbone]) -> None:
        assert markdown(sorted(everything, key=lambda one: one.name)) in PAGE.read_text(encoding="utf-8")


def test_figures_of_one_of_each_kind() -> None:
    found = {one.name: one for one in backbones(names=SOME)}
    vit = found["ViT-B-32"]
    assert (vit.tower, vit.text, vit.image_size, vit.patch, vit.stages, vit.embed_dim) == (
        "ViT", "CLIP's", [224, 224], 32, 12, 512
    )  # fmt: skip
    assert vit.parameters == 151.3  # of the published model
    # 86 M weights of the blocks and the patch embedding, 50 tokens, two operations each, and attention.
    assert vit.gflops == pytest.approx(8.8, abs=0.3)
    assert vit.weights["openai"]
    assert (found["RN50x4"].tower, found["RN50x4"].stages, found["RN50x4"].patch) == ("ResNet", 4, 32)
    assert found["MobileCLIP2-S0"].tower == "fastvit_mci0"
    assert found["ViT-B-16-SigLIP2"].text == "CLIP's, tokenizer timm/ViT-B-16-SigLIP2"
    assert "roberta-base" in found["roberta-ViT-B-32"].refused
    assert [one.name for one in found.values() if one.refused] == ["roberta-ViT-B-32"]
    rows = [line for line in markdown(list(found.values())).splitlines() if any(f" {name} " in line for name in found)]
    assert len(rows) == len(found)
    assert set(rows) <= set(PAGE.read_text(encoding="utf-8").splitlines())
    assert next(iter(backbones(320, ["ViT-B-32"]))).gflops > vit.gflops


class TestCommand:
    def test_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["backbones", "RN50", "ViT-B-32"])
        printed = capsys.readouterr().out
        assert "2 of 2 architectures" in printed
        (line,) = (line for line in printed.splitlines() if line.split()[:2] == ["RN50", "ResNet"])
        assert line.split()[2:] == ["CLIP's", "224", "32", "4", "1024", "102.0", "12.2", "3"]
        assert "RN50: openai, yfcc15m, cc12m" in printed

    def test_what_cannot_be_used_is_named_below(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["backbones", "roberta-ViT-B-32", "RN50"])
        printed = capsys.readouterr().out
        assert "1 of 2 architectures and 3 of 4 weights" in printed
        assert "- roberta-ViT-B-32: needs the configuration of roberta-base" in printed

    def test_json_sorted(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["backbones", "--json", "--sort", "gflops", "ViT-B-16", "ViT-B-32", "MobileCLIP2-S0"])
        content = json.loads(capsys.readouterr().out)
        assert [one["name"] for one in content] == ["MobileCLIP2-S0", "ViT-B-32", "ViT-B-16"]
        assert content[1]["weights"]["openai"].startswith("timm/") or "openai" in content[1]["weights"]["openai"]

    def test_a_size_that_patches_do_not_tile_is_told(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["backbones", "--json", "--image_size", "100", "ViT-B-32"])
        (found,) = json.loads(capsys.readouterr().out)
        assert "`image_size` must be a multiple of ViT-B-32's patch of 32 pixels" in found["refused"]

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [(["nobody"], "names must be"), (["--image_size", "0"], "above 0"), (["--sort", "age"], "invalid choice")],
    )
    def test_bad_use(self, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["backbones", *arguments])
        assert ended.value.code == 2
        assert text in capsys.readouterr().err
