"""The import graph of the package: levels, no cycles, self-contained files, a quick root."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


SOURCE = Path(__file__).resolve().parents[1] / "src" / "diffusers_srepa"
PACKAGE = "diffusers_srepa"

LEVELS = [
    {"errors", "files", "hooks", "hub_errors", "interpolant", "randomness", "tokens"},
    {"models", "schedulers", "latents", "teachers", "alignment"},
    {"pipelines", "data"},
    {"configuration", "publishing", "sampling"},
    {"evaluation", "conversion"},
    {"training", "visualization"},
    {"cli"},
]
SELF_CONTAINED = (
    "models/transformer_sit.py",
    "schedulers/scheduling_flow_match_euler_maruyama.py",
    "pipelines/pipeline_sit.py",
)
# The rest of level 0 may use the exceptions, which import nothing themselves.
SAME_LEVEL_ALLOWED = {(part, "errors") for part in LEVELS[0]}


def _files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def _module(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(file: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, inside functions too."""
    modules = {_module(path) for path in _files()}
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            name = node.module or ""
            found |= {f"{name}.{alias.name}" if f"{name}.{alias.name}" in modules else name for alias in node.names}
    return {name for name in found if name == PACKAGE or name.startswith(PACKAGE + ".")}


def _part(module: str) -> str:
    """The folder or top-level file that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


def _level(part: str) -> int:
    levels = [number for number, parts in enumerate(LEVELS) if part in parts]
    assert levels, f"{part} has no level: add it to LEVELS"
    return levels[0]


@pytest.mark.parametrize("file", _files(), ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_go_down(file: Path) -> None:
    importer = _module(file)
    if importer == PACKAGE:
        return
    for imported in _imports(file):
        assert imported != PACKAGE, f"{importer} imports the package root"
        own, other = _part(importer), _part(imported)
        if own == other or (own, other) in SAME_LEVEL_ALLOWED:
            continue
        assert _level(other) < _level(own), f"{importer} (level {_level(own)}) imports {imported} ({_level(other)})"


def test_no_import_cycles() -> None:
    graph = {_module(file): _imports(file) for file in _files()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module in done:
            return
        for imported in graph.get(module, ()):
            visit(imported, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("name", SELF_CONTAINED)
def test_files_that_a_repository_ships_are_self_contained(name: str) -> None:
    assert _imports(SOURCE / name) == set()


def test_package_files_only_reexport() -> None:
    for file in SOURCE.rglob("__init__.py"):
        if file.parent == SOURCE:
            continue
        body = [node for node in ast.parse(file.read_text()).body if not isinstance(node, ast.Import | ast.ImportFrom)]
        code = [node for node in body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
        code = [node for node in code if not (isinstance(node, ast.Assign) and node.targets[0].id == "__all__")]
        assert not code, f"{file} holds code"


def test_root_import_is_lazy_and_every_public_name_resolves() -> None:
    script = (
        "import sys, diffusers_srepa as package\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "missing = [name for name in package.__all__ if getattr(package, name, None) is None]\n"
        "assert not missing, missing\n"
        "try:\n    package.Nonsense\nexcept AttributeError:\n    print('ok')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.strip() == "ok", result.stderr
