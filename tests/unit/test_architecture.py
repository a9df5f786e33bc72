"""The house rules that can be read off the source: imports, sizes, repetitions."""

import ast
from pathlib import Path

import pytest

import anomalib_aprilgan

PACKAGE = Path(anomalib_aprilgan.__file__).parent
# Layers from the ground up: a room imports from its own layer and lower ones.
LAYERS = [
    (
        "checks",
        "classes",
        "config_files",
        "csv_text",
        "files",
        "recipe",
        "running",
        "tile_layout",
        "timing",
        "value_names",
    ),
    ("clip", "runtime"),
    ("network", "data", "decision", "metrics"),
    ("remembering",),
    ("settings", "provenance", "migration", "kept_features"),
    (
        *("building", "components", "inspection", "preparation", "checkpoint", "sharing", "training", "growing"),
        *("results", "reporting", "deployment", "exporting"),
    ),
    ("lightning_model",),
    ("plugin", "__init__", "demo", "evaluation", "single_images", "watching", "command", "commands"),
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
    ("room", "may"),
    [
        ("demo", {"demo", "evaluation", "plugin", "__init__", "commands"}),
        ("evaluation", {"evaluation", "demo", "commands"}),
    ],
)
def test_the_core_knows_neither_demo_nor_evaluation(room: str, may: set[str]) -> None:
    users = {name.partition(".")[0] for name, path in MODULES.items() if room in rooms_of(imported(name, path))}
    assert users <= may


def test_two_modules_import_open_clip() -> None:
    users = {
        name
        for name, path in MODULES.items()
        if any(module.split(".")[0] == "open_clip" for module in imported(name, path))
    }
    assert users == {"clip.library", "clip.library_text"}


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


# -- sizes, repetitions and exceptions of the core: everything but the demo and the evaluation ----------

CORE = {name: path for name, path in MODULES.items() if name.partition(".")[0] not in {"demo", "evaluation"}}
# Functions whose body may be longer than 40 lines, and why.
LONG_FUNCTIONS: dict[str, str] = {}
RATION = 40  # of casts, ignored types and lint rules together


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body, its docstring and what follows the last statement left out."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def statement_lines(path: Path) -> list[tuple[int, str]]:
    """Numbered lines of code, stripped: without imports, signatures, docstrings, comments and empty lines.

    A signature that must match another one, such as that of an overridden hook, says the same.
    """
    text = path.read_text(encoding="utf-8")
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, (ast.Import, ast.ImportFrom)):
            left_out |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, ast.FunctionDef):
            left_out |= set(range(node.lineno, node.body[0].lineno))
    numbered = enumerate(text.splitlines(), start=1)
    lines = [(number, line.strip()) for number, line in numbered if number not in left_out]
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("name", CORE)
def test_files_are_short(name: str) -> None:
    length = len(CORE[name].read_text(encoding="utf-8").splitlines())
    assert length <= (350 if name == "lightning_model" else 300)


@pytest.mark.parametrize("name", CORE)
def test_functions_are_short(name: str) -> None:
    functions = [
        node
        for node in ast.walk(ast.parse(CORE[name].read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    long = {f"{name}.{function.name}" for function in functions if body_lines(function) > 40}
    assert long <= set(LONG_FUNCTIONS)


def test_no_six_lines_stand_twice() -> None:
    places: dict[tuple[str, ...], list[str]] = {}
    for name, path in CORE.items():
        lines = statement_lines(path)
        for start in range(len(lines) - 5):
            block = tuple(line for _, line in lines[start : start + 6])
            places.setdefault(block, []).append(f"{name}:{lines[start][0]}")
    repeated = [" and ".join(found) for found in places.values() if len(found) > 1]
    assert repeated == []


def test_exceptions_from_types_and_lint_are_rare() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in CORE.values())
    found = {mark: text.count(mark) for mark in ("cast(", "# type: ignore", "# noqa")}
    assert sum(found.values()) <= RATION, found


def test_what_is_inspected_is_an_image() -> None:
    users = {name for name, path in CORE.items() if "picture" in path.read_text(encoding="utf-8").lower()}
    assert users == set()


def test_the_measures_of_size_see_what_they_should(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '"""Text."""\n\nimport os\nfrom pathlib import (\n    Path,\n)\n\n\n'
        'def f():\n    """Text.\n\n    More.\n    """\n'
        "    # Why.\n    x = [\n        1,\n    ]\n\n    return x\n",
        encoding="utf-8",
    )
    (function,) = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
    assert body_lines(function) == 5
    assert statement_lines(path) == [(15, "x = ["), (16, "1,"), (17, "]"), (19, "return x")]
