"""Who may import whom: imports point to a lower level, and each dependency has one door.

The tests read the source; nothing is imported.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A part is a module of mofo/ or one of its sub-packages.
LEVELS = {
    0: {"flow", "schedule", "depth", "geometry", "alignment", "metrics", "picture"},
    1: {"model"},
    2: {"frozen", "memory", "objective", "sampler", "result", "data"},
    3: {"calls", "pipeline", "evaluation"},
    4: {"training"},
    5: {"cli", "options", "demo"},
}
# The imports inside one level: a schedule draws from flow's streams of randomness, metrics are
# of aligned depth, evaluation runs the pipeline, the command line starts the page.
PEERS = {
    ("schedule", "flow"),
    ("metrics", "alignment"),
    ("pipeline", "calls"),
    ("evaluation", "pipeline"),
    ("cli", "options"),
    ("cli", "demo"),
}

# Where a dependency may be imported, as path prefixes; the longest matching name decides.
LEVEL_0 = tuple(f"mofo/{part}.py" for part in LEVELS[0])
DOORS: dict[str, tuple[str, ...]] = {
    "lightning": ("mofo/training/", "mofo/data/module.py", "train.py"),
    "pytorch_lightning": (),
    "hydra": (
        "train.py",
        "evaluate.py",
        "mofo/training/export.py",
        "mofo/training/plan.py",
        "mofo/training/run.py",
    ),
    "omegaconf": (
        "train.py",
        "evaluate.py",
        "mofo/training/export.py",
        "mofo/training/launch.py",
        "mofo/training/run.py",
    ),
    "transformers": (
        "mofo/model/text.py",
        "mofo/data/caption.py",
        "mofo/evaluation/predictors.py",
    ),
    "diffusers": ("mofo/model/autoencoder.py",),
    "safetensors": ("mofo/model/weights.py",),
    "trimesh": ("mofo/geometry.py",),
    "huggingface_hub": ("mofo/model/hub.py",),
    "pyarrow": ("mofo/data/",),
    "fsspec": ("mofo/data/",),
    "webdataset": (),
    "h5py": ("mofo/data/convert/", "mofo/evaluation/sets/"),
    "scipy.io": ("mofo/data/convert/", "mofo/evaluation/sets/"),
    "scipy": LEVEL_0,
    "gradio": ("mofo/demo/",),
    "OpenEXR": ("mofo/data/inputs.py", "mofo/data/convert/rgbd_folder.py"),
    "wandb": (),
}

# Names under which anything can be hidden.
EMPTY_WORDS = {
    "info",
    "tmp",
    "helper",
    "manager",
    "processor",
    "handler",
    "wrapper",
    "base",
    "common",
    "misc",
    "utils",
}
# Installed under another name than the one that is imported.
DISTRIBUTIONS = {"PIL": "pillow", "hydra": "hydra-core"}

PACKAGE = sorted((ROOT / "mofo").rglob("*.py"))
ENTRIES = [path for path in (ROOT / "train.py", ROOT / "evaluate.py") if path.exists()]


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of every import, also in functions; relative ones resolved."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                above = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                origin = ".".join([*above, *([module] if module else [])])
                yield from ((node.lineno, f"{origin}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return imported(path.read_text(encoding="utf-8"), package)


def level_of(part: str) -> int | None:
    return next((level for level, parts in LEVELS.items() if part in parts), None)


def may_import(importer: str, other: str) -> bool:
    if importer == other or (importer, other) in PEERS:
        return True
    low, high = level_of(other), level_of(importer)
    return low is not None and high is not None and low < high


def door_of(name: str) -> str | None:
    """The longest entry of DOORS that the dotted name is, or lies under."""
    fits = [door for door in DOORS if name == door or name.startswith(f"{door}.")]
    return max(fits, key=len, default=None)


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "mofo").with_suffix("").parts[0]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_module_has_a_level() -> None:
    parts = {part_of(path) for path in PACKAGE} - {"__init__"}
    strangers = sorted(part for part in parts if level_of(part) is None)
    assert not strangers, (
        f"no level for mofo/{strangers}: choose one, add it to LEVELS in tests/test_levels.py"
    )


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_imports_point_to_a_lower_level_or_stay_inside_a_sub_package(path: Path) -> None:
    importer = part_of(path)
    wrong = [
        f"{relative(path)}:{line} imports {name}, which is not below {importer}"
        for line, name in imports_of(path)
        if name.startswith("mofo.")
        and (other := name.split(".")[1]) not in {"__version__", "small"}
        and not may_import(importer, other)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_the_package_does_not_import_the_entry_points(path: Path) -> None:
    assert not {name.split(".")[0] for _, name in imports_of(path)} & {"train", "evaluate", "tests"}


@pytest.mark.parametrize("path", PACKAGE + ENTRIES, ids=relative)
def test_a_dependency_is_imported_only_at_its_door(path: Path) -> None:
    wrong = [
        f"{relative(path)}:{line} imports {name}; {door} may be imported in: "
        + (", ".join(sorted(DOORS[door])) or "no file")
        for line, name in imports_of(path)
        if (door := door_of(name)) and not relative(path).startswith(DOORS[door])
    ]
    assert not wrong, "\n".join(wrong)


def test_every_import_is_declared_in_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    declared = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in wanted}
    known = {*sys.stdlib_module_names, "mofo"}
    tops = {name.split(".")[0] for path in PACKAGE + ENTRIES for _, name in imports_of(path)}
    names = {DISTRIBUTIONS.get(top, top).lower() for top in tops - known}
    assert not names - declared, f"imported, not declared: {sorted(names - declared)}"


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_no_file_class_or_variable_has_an_empty_name(path: Path) -> None:
    used = {(1, word) for word in path.relative_to(ROOT).with_suffix("").as_posix().split("/")}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.ClassDef(name=name):
                used |= {(node.lineno, word.lower()) for word in re.findall("[A-Z][a-z]+", name)}
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                used.add((node.lineno, name))
    wrong = [f"{relative(path)}:{line} {name}" for line, name in used if name in EMPTY_WORDS]
    assert not wrong, f"{wrong}: say what it is (these words are refused: {sorted(EMPTY_WORDS)})"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import scipy.io", ["scipy.io"]),
        ("from scipy import io", ["scipy.io"]),
        ("def late():\n    import wandb as w", ["wandb"]),
        ("from . import dit", ["mofo.model.dit"]),
        ("from ..flow import corrupt", ["mofo.flow.corrupt"]),
        ("import importlib\nimportlib.import_module('wandb')", ["importlib", "wandb"]),
    ],
)
def test_the_reader_sees_every_kind_of_import(source: str, names: list[str]) -> None:
    assert [name for _, name in imported(source, "mofo.model")] == names


def test_the_rules_refuse_what_they_should() -> None:
    assert not may_import("flow", "model")
    assert not may_import("pipeline", "training")
    assert not may_import("flow", "schedule")
    assert may_import("cli", "demo")
    assert not may_import("demo", "cli")
    assert door_of("scipy.io.loadmat") == "scipy.io"
    assert door_of("scipy.ndimage") == "scipy"
    assert door_of("lightning_thunder") is None
