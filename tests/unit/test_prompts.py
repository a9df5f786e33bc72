"""Sentences of a class: their number and order, class names with odd characters, and lists from YAML."""

import itertools
from pathlib import Path

import pytest

from anomalib_aprilgan.clip.prompts import ANOMALOUS_STATES, NORMAL_STATES, TEMPLATES, PromptEnsemble

SMALL = PromptEnsemble(normal=("{}", "good {}"), anomalous=("bad {}",), templates=("a {}.", "the {}!"))


def write(folder: Path, text: str) -> Path:
    path = folder / "prompts.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_small_ensemble_by_hand() -> None:
    normal, anomalous = SMALL.sentences("nut")
    assert normal == ["a nut.", "the nut!", "a good nut.", "the good nut!"]  # state by state
    assert anomalous == ["a bad nut.", "the bad nut!"]


def test_published_lists_are_the_product_of_states_and_templates() -> None:
    normal, anomalous = PromptEnsemble().sentences("metal_nut")
    for sentences, states, count in ((normal, NORMAL_STATES, 245), (anomalous, ANOMALOUS_STATES, 175)):
        slow = [t.format(s.format("metal_nut")) for s, t in itertools.product(states, TEMPLATES)]
        assert sentences == slow
        assert len(sentences) == len(set(sentences)) == count


@pytest.mark.parametrize("name", ["a {} b", "{0}", "100 %", "Schraube ü", "two words"])
def test_class_name_is_taken_as_it_is(name: str) -> None:
    ensemble = PromptEnsemble(normal=("{}",), anomalous=("{} with flaw",), templates=("a photo of {}.",))
    normal, anomalous = ensemble.sentences(name)
    assert anomalous == [f"a photo of {name} with flaw."]
    assert normal == [f"a photo of {name}."]


@pytest.mark.parametrize("name", ["", " ", "\t\n"])
def test_empty_class_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"`class_name` must name an object, got .* Try 'object'"):
        SMALL.sentences(name)


@pytest.mark.parametrize("field", ["normal", "anomalous", "templates"])
@pytest.mark.parametrize("entry", ["no slot", "{} and {}", "{name}", "{0}", "{!r}", "{:>8}", "open {", "close }"])
def test_entries_need_one_slot(field: str, entry: str) -> None:
    with pytest.raises(ValueError, match=rf"`prompts.{field}` entries need exactly one '\{{\}}', got "):
        PromptEnsemble(**{field: ("fine {}", entry)})


def test_escaped_braces_do_not_count_as_slots() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        PromptEnsemble(templates=("{{}}",))


@pytest.mark.parametrize("field", ["normal", "anomalous", "templates"])
def test_empty_lists(field: str) -> None:
    with pytest.raises(ValueError, match=rf"`prompts.{field}` must hold at least one entry, got none"):
        PromptEnsemble(**{field: ()})


class TestFromFile:
    def test_absent_keys_keep_the_published_lists(self, tmp_path: Path) -> None:
        ensemble = PromptEnsemble.from_file(write(tmp_path, "normal:\n  - 'clean {}'\n"))
        assert ensemble.normal == ("clean {}",)
        assert ensemble.anomalous == ANOMALOUS_STATES
        assert ensemble.templates == TEMPLATES

    def test_all_keys_and_a_path_as_string(self, tmp_path: Path) -> None:
        path = write(tmp_path, "normal: ['{}']\nanomalous: ['kaputte {}', 'ölige {}']\ntemplates: ['{}?']\n")
        assert PromptEnsemble.from_file(str(path)).sentences("Mutter") == (
            ["Mutter?"],
            ["kaputte Mutter?", "ölige Mutter?"],
        )

    def test_classes_have_lists_of_their_own(self, tmp_path: Path) -> None:
        text = (
            "templates: ['{}!']\n"
            "classes:\n"
            "  nut: {normal: ['shiny {}']}\n"
            "  pin: {templates: ['{}?'], anomalous: ['bent {}']}\n"
        )
        ensemble = PromptEnsemble.from_file(write(tmp_path, text))
        assert ensemble.of_class("nut").sentences("metal nut")[0] == ["shiny metal nut!"]
        assert ensemble.of_class("nut").anomalous == ANOMALOUS_STATES
        assert ensemble.of_class("pin").sentences("pin")[1] == ["bent pin?"]
        assert ensemble.of_class("gear") is ensemble
        assert ensemble.to_dict() == PromptEnsemble.from_file(write(tmp_path, text)).to_dict()
        assert ensemble.to_dict() != PromptEnsemble(templates=("{}!",)).to_dict()

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"`prompts`: no file .*absent\.yaml\. Pass a YAML file"):
            PromptEnsemble.from_file(tmp_path / "absent.yaml")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("normall: ['{}']\n", r"must be a mapping with keys out of .*got \['normall'\]"),
            ("- '{}'\n- '{}'\n", r"must be a mapping with keys out of .*got list"),
            ("normal: ['{}'\nanomalous: ]", "is not readable YAML"),
            ("just words\n", "must be a mapping|is not readable YAML"),
            ("normal: []\n", r"`prompts.normal` must hold at least one entry, got none"),
            ("normal: ['good part']\n", r"`prompts.normal` entries need exactly one '\{\}', got 'good part'"),
            ("templates: ['{} of {}']\n", r"`prompts.templates` entries need exactly one '\{\}', got '\{\} of \{\}'"),
            ("anomalous: [7]\n", r"`prompts.anomalous` entries need exactly one '\{\}', got 7"),
            ("normal: '{}'\n", r"'normal' in .* must be a list of strings, got str"),
            ("normal:\n", r"'normal' in .* must be a list of strings, got NoneType"),
            (
                "classes: {nut: {state: ['{}']}}\n",
                r"classes\.nut in .*must be a mapping with keys out of .*\['state'\]",
            ),
            ("classes: {nut: {normal: ['good part']}}\n", r"`prompts.normal` entries need exactly one '\{\}'"),
            ("classes: [nut]\n", r"classes in .*must be a mapping with keys out of the class names, got list"),
            ("classes: {nut: {classes: {}}}\n", r"classes\.nut in .*got \['classes'\]"),
            ("normal: ['${missing}']\n", r"`prompts.normal` entries need|is not readable YAML"),
        ],
    )
    def test_unusable_content(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            PromptEnsemble.from_file(write(tmp_path, text))

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        path = tmp_path / "prompts.yaml"
        path.write_bytes(b"\xff\xfe\x00\xd8binary")
        with pytest.raises(ValueError, match="is not readable YAML"):
            PromptEnsemble.from_file(path)
