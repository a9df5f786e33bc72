"""What a learned thing was made from: equal recipes, equal thing."""

import json

import pytest
import torch

from anomalib_aprilgan.recipe import Recipe, RowRecipes, digest, digest_of_tensors


class TestRecipe:
    @pytest.mark.parametrize(
        ("one", "other"),
        [((96, 64), [96, 64]), ({"a": 1, "b": (2,)}, {"b": [2], "a": 1}), ("text", "text"), (None, None)],
    )
    def test_equal_ingredients_make_equal_recipes(self, one: object, other: object) -> None:
        assert Recipe.of(size=one, seed=1) == Recipe.of(seed=1, size=other)
        assert Recipe.of(size=one, seed=1).digest == Recipe.of(seed=1, size=other).digest

    @pytest.mark.parametrize(
        ("one", "other"), [((96, 64), (64, 96)), (1, "1"), (None, "null"), (["a", "b"], ["ab"]), (0.1, 0.2)]
    )
    def test_other_ingredients_make_other_recipes(self, one: object, other: object) -> None:
        assert Recipe.of(size=one) != Recipe.of(size=other)
        assert Recipe.of(size=one).digest != Recipe.of(size=other).digest
        assert not Recipe.of(size=one).agrees(Recipe.of(size=other))

    def test_names_of_ingredients_count(self) -> None:
        assert Recipe.of(low=1, high=2).digest != Recipe.of(low=2, high=1).digest

    def test_what_a_thing_rests_on_counts_with_all_of_its_ingredients(self) -> None:
        clips = [Recipe.of(weights="00ff", quick_gelu=flag) for flag in (False, True)]
        text = [Recipe.of(clip=clip, words="nut") for clip in clips]
        bounds = [Recipe.of(text=recipe) for recipe in text]
        assert bounds[0] != bounds[1]
        assert bounds[0] == Recipe.of(text=Recipe.of(clip=Recipe.of(quick_gelu=False, weights="00ff"), words="nut"))

    def test_ingredients_are_plain_text(self) -> None:
        recipe = Recipe.of(clip=Recipe.of(weights="00ff"), references=("a", "b"), number=2, sigma=None)
        assert all(isinstance(text, str) for text in recipe.ingredients.values())
        assert Recipe(json.loads(json.dumps(dict(recipe.ingredients)))) == recipe


class TestAgreement:
    WANTED = Recipe.of(references=["a"], number=1, precision="32-true")

    def test_with_the_same(self) -> None:
        assert Recipe.of(references=["a"], number=1, precision="32-true").agrees(self.WANTED)

    def test_what_an_earlier_version_does_not_know_does_not_count(self) -> None:
        assert Recipe.of(references=["a"]).agrees(self.WANTED)
        assert Recipe({}).agrees(self.WANTED)
        assert not Recipe.of(references=["b"]).agrees(self.WANTED)

    def test_what_is_no_longer_an_ingredient_counts(self) -> None:
        assert not Recipe.of(references=["a"], number=1, precision="32-true", tiles=4).agrees(self.WANTED)

    def test_ignored_ingredients(self) -> None:
        moved = Recipe.of(references=["b"], number=1, precision="16-mixed")
        assert moved.agrees(self.WANTED, "references", "precision")
        assert not moved.agrees(self.WANTED, "references")


def test_recipes_of_a_row_survive_plain_data() -> None:
    recipes = RowRecipes(
        text=Recipe.of(normal=["a good nut"]), bank=Recipe.of(references=["00ff"]), asked="seed 0", references=["a.png"]
    )
    assert RowRecipes.from_dict(json.loads(json.dumps(recipes.to_dict()))) == recipes
    assert RowRecipes.from_dict(RowRecipes().to_dict()) == RowRecipes()


class TestDigests:
    def test_by_hand(self) -> None:
        assert digest(b"") == "cae66941d9efbd404e4d88758ea67670"  # BLAKE2b with 16 bytes

    def test_of_tensors_is_the_same_in_every_type_that_holds_the_values(self) -> None:
        tensors = {"a": torch.tensor([0.5, 1.0]), "b": torch.tensor([[2.0]])}
        expected = digest_of_tensors(tensors)
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            assert digest_of_tensors({name: value.to(dtype) for name, value in tensors.items()}) == expected
        assert digest_of_tensors(dict(reversed(tensors.items()))) == expected
        assert digest_of_tensors({"a": torch.tensor([0.5, 9.0, 1.0])[::2], "b": tensors["b"]}) == expected

    @pytest.mark.parametrize(
        "other",
        [
            {"a": torch.tensor([1.0, 0.5])},
            {"b": torch.tensor([0.5, 1.0])},
            {"a": torch.tensor([[0.5, 1.0]])},
            {"a": torch.tensor([0.5]), "b": torch.tensor([1.0])},
        ],
    )
    def test_of_tensors_with_other_values_names_or_shapes(self, other: dict[str, torch.Tensor]) -> None:
        assert digest_of_tensors(other) != digest_of_tensors({"a": torch.tensor([0.5, 1.0])})
