"""The architecture: which folder of a package may import which, and no import circle between modules."""

import ast
import graphlib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A package's folders and top-level modules, a line a layer: each may import from the lines below its own,
# and a folder also from itself. docs/glossary.md says what the folders are.
LAYERS = {
    "lemo_trainer": (
        "__init__ cli",
        "arguments commands",
        "callback offline",
        "patch",
        "report",
        "exact",
        "session",
        "layers",
        "head informativeness",
        "model",
        "config kernels measure",
        "compat files registry sizes texts",
    ),
    "ollie_compile": (
        "__init__ cli",
        "explanation export",
        "backend commands",
        "graph",
        "report",
        "plan",
        "problems",
        "search",
        "measure",
        "lower",
        "custom targets",
        "config kernels lift rules",
        "compat expr store",
    ),
    "ripple_loader": (
        "__init__ cli",
        "loader studies",
        "offline online",
        "format",
        "storage",
        "checkpoint",
        "config kernels model",
        "compat files registry report",
    ),
}


@cache
def imports(package: str) -> dict[str, frozenset[str]]:
    """What each module of a package imports of it, inside of functions too, by dotted names."""
    paths = {name_of(path): path for path in sorted((ROOT / package).rglob("*.py"))}
    return {name: frozenset(_imported(path, paths) - {name}) for name, path in paths.items()}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(path: Path, known: dict[str, Path]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative imports are not used here"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= submodules & known.keys()
            if not submodules <= known.keys():
                found.add(node.module)
    return found & known.keys()


@pytest.mark.parametrize("package", LAYERS)
def test_imports_go_downwards(package):
    layer = {name: depth for depth, names in enumerate(LAYERS[package]) for name in names.split()}

    def entry(module: str) -> str:
        return [*module.split("."), "__init__"][1]

    assert {entry(module) for module in imports(package)} == layer.keys()
    upwards = [
        f"{module} imports {other}"
        for module, others in imports(package).items()
        for other in others
        if entry(module) != entry(other) and layer[entry(module)] >= layer[entry(other)]
    ]
    assert upwards == []


@pytest.mark.parametrize("package", LAYERS)
def test_no_module_imports_itself_in_a_circle(package):
    graphlib.TopologicalSorter(imports(package)).prepare()
