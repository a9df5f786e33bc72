"""Captions of drawn pictures: what a sentence says of product, state and defect, and which pictures it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...clip.prompts import ANOMALOUS_STATES, NORMAL_STATES, TEMPLATES
from ..drawing import INVENTIONS

BARE_STATE = "{}"
# How an inspector would name each defect kind; kinds kept out of training have no words either.
DEFECT_STATES = {
    "bent": ("bent {}", "{} with a bent edge", "deformed {}"),
    "blur": ("blurred {}", "{} with a blurred spot"),
    "contamination": ("contaminated {}", "dirty {}", "{} with dirt"),
    "crack": ("cracked {}", "{} with a crack"),
    "dent": ("dented {}", "{} with a dent"),
    "discolouration": ("discoloured {}", "{} with a discolouration"),
    "fibre": ("{} with a fibre", "{} with a hair on it"),
    "hairline": ("{} with a hairline crack", "{} with a fine line"),
    "hole": ("{} with a hole", "pierced {}"),
    "misaligned": ("misaligned {}", "{} with a shifted part"),
    "missing_piece": ("{} with a missing piece", "chipped {}", "incomplete {}"),
    "rotated_patch": ("{} with a rotated part", "{} with a twisted part"),
    "scratch": ("scratched {}", "{} with a scratch"),
    "stain": ("stained {}", "{} with a stain"),
}
# Nouns that fit every picture.
GENERIC_NOUNS = ("object", "thing", "part", "item", "product", "piece", "component", "surface", "material", "sample")
# Nouns that fit none: a state is to be understood beside a word that says nothing about the picture,
# so that products never captioned can be judged by their name. None of them is a drawn category.
UNRELATED_NOUNS = (
    "apple", "table", "house", "river", "lamp", "shoe", "chair", "pen", "paper", "stone", "rope", "plate", "spoon",
    "knife", "hammer", "wheel", "bridge", "clock", "phone", "camera", "guitar", "violin", "hat", "coat", "glove",
    "sock", "box", "bag", "basket", "cup", "bowl", "jar", "lid", "pipe", "tube", "wire", "hose", "belt", "chain",
    "ring", "coin", "key", "lock", "door", "window", "wall", "roof", "floor", "brush", "comb", "mirror", "towel",
    "pillow", "blanket", "sheet", "curtain", "toothbrush", "transistor", "hazelnut", "candle", "cashew", "macaroni",
    "pcb", "toy", "car", "bus", "train", "plane", "boat", "metal_plate", "glass_bottle", "fuse", "battery",
    "sensor", "lens", "spring", "bolt", "rivet", "hinge", "bracket", "panel", "plank", "slab", "foil", "film",
    "cloth",
)  # fmt: skip


@dataclass(frozen=True)
class Caption:
    """A sentence and what it says.

    Attributes:
        text: The sentence.
        category: The product it names; ``None`` where the noun says nothing.
        anomalous: The state it tells; ``None`` where it tells none.
        kind: The defect it names, or ``None``.
    """

    text: str
    category: str | None
    anomalous: bool | None
    kind: str | None

    def fits(self, category: str, kind: str | None) -> bool:
        """Whether the sentence is true of a picture.

        Args:
            category: What the picture shows.
            kind: Its defect; ``None`` for a good one.
        """
        return (
            self.category in (None, category)
            and self.anomalous in (None, kind is not None)
            and (self.kind is None or self.kind == kind)
        )


def draw_noun(category: str, generator: np.random.Generator) -> tuple[str, str | None]:
    """A noun for a picture, and the category it names: the category's own, a generic or an unrelated one.

    What is invented has no name.
    """
    draw = generator.random()
    if draw < 0.55 and category not in INVENTIONS:
        return category, category
    nouns = GENERIC_NOUNS if draw < 0.75 else UNRELATED_NOUNS
    return str(generator.choice(nouns)), None


def draw_caption(category: str, kind: str | None, generator: np.random.Generator) -> Caption:
    """A true caption of a picture.

    Args:
        category: What the picture shows.
        kind: Its defect; ``None`` for a good one.
        generator: Source of the choice of noun, state and template.
    """
    noun, named = draw_noun(category, generator)
    anomalous: bool | None = kind is not None
    told: str | None = None
    if named is not None and generator.random() < 0.08:
        state, anomalous = BARE_STATE, None
    elif kind is None:
        state = str(generator.choice(NORMAL_STATES[1:]))
    elif generator.random() < 0.3:
        state, told = str(generator.choice(DEFECT_STATES[kind])), kind
    else:
        state = str(generator.choice(ANOMALOUS_STATES))
    return Caption(_sentence(state, noun, generator), named, anomalous, told)


def draw_state_sentences(noun: str, number: int, generator: np.random.Generator) -> tuple[list[str], list[str]]:
    """Some of the sentences of the paper's ensemble about a noun: so many normal, as many anomalous ones."""
    normal, anomalous = (
        [_sentence(state, noun, generator) for state in _spread(states, number, generator)]
        for states in (NORMAL_STATES, ANOMALOUS_STATES)
    )
    return normal, anomalous


def _spread(states: Sequence[str], number: int, generator: np.random.Generator) -> list[str]:
    """As many states, none a second time before all others came."""
    rounds = -(-number // len(states))
    return [str(state) for _ in range(rounds) for state in generator.permutation(states)][:number]


def _sentence(state: str, noun: str, generator: np.random.Generator) -> str:
    return TEMPLATES[int(generator.integers(len(TEMPLATES)))].replace("{}", state.replace("{}", noun))
