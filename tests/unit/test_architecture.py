"""The house rules that can be read off the imports."""

import ast
from pathlib import Path

import pytest

import anomalib_aprilgan

PACKAGE = Path(anomalib_aprilgan.__file__).parent
# Layers from the ground up: a room imports from its own layer and lower ones.
LAYERS = [
    ("class_names", "class_rows", "distributed", "files"),
    ("clip",),
    ("network", "data", "decision"),
    ("arguments", "preparation", "checkpoint", "export", "results"),
    ("lightning_model",),
    ("plugin", "__init__", "demo", "evaluation"),
]
LAYER_OF = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}


def modules() -> dict[str, Path]:
    """Dotted names below the package, without what the start-up hook installs beside it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] != "startup":
            found[".".join(parts)] = path
    return found


def imported(name: str, path: Path) -> set[str]:
    """Absolute dotted names of everything a module imports, at any depth of its code."""
    package = ["anomalib_aprilgan", *name.split(".")[:-1]]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{stem}.{alias.name}" for alias in node.names}
    return names


def rooms_of(names: set[str]) -> set[str]:
    """Rooms of this package among imported names."""
    own = {name.split(".")[1] for name in names if name.startswith("anomalib_aprilgan.")}
    # `from anomalib_aprilgan import AprilGAN` goes through the front door.
    return {room if room in LAYER_OF else "__init__" for room in own}


MODULES = modules()


def test_every_module_is_in_a_room() -> None:
    assert len(MODULES) > 40
    assert {name.split(".")[0] for name in MODULES} <= set(LAYER_OF)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    layer = LAYER_OF[name.partition(".")[0]]
    above = {room for room in rooms_of(imported(name, MODULES[name])) if LAYER_OF[room] > layer}
    assert above == set()


@pytest.mark.parametrize(
    ("room", "may"), [("demo", {"demo", "plugin", "__init__"}), ("evaluation", {"evaluation", "demo"})]
)
def test_the_core_knows_neither_demo_nor_evaluation(room: str, may: set[str]) -> None:
    users = {name.partition(".")[0] for name, path in MODULES.items() if room in rooms_of(imported(name, path))}
    assert users <= may


def test_one_module_imports_open_clip() -> None:
    users = {
        name
        for name, path in MODULES.items()
        if any(module.split(".")[0] == "open_clip" for module in imported(name, path))
    }
    assert users == {"clip.library"}


def test_no_room_for_odds_and_ends() -> None:
    assert not {"utils", "util", "common", "helpers", "base", "misc"} & {name.split(".")[-1] for name in MODULES}


def test_the_reader_of_imports_sees_what_it_should(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import open_clip.model\n"
        "from . import plugin\n"
        "from ..clip.weights import fetch\n"
        "def f():\n"
        "    from anomalib_aprilgan import AprilGAN\n",
        encoding="utf-8",
    )
    names = imported("data.module", path)
    assert names == {
        "open_clip.model",
        "anomalib_aprilgan.data.plugin",
        "anomalib_aprilgan.clip.weights.fetch",
        "anomalib_aprilgan.AprilGAN",
    }
    assert rooms_of(names) == {"data", "clip", "__init__"}
