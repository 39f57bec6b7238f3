"""The shape of the code: layers without circles, files and classes of a readable size, short names of tests."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lit_align"

# A file imports from its own layer and from those before it, never from a later one.
LAYERS = [
    "allocation",
    "lazy",
    "errors",
    "dtypes",
    "arguments",
    "console",
    "files",
    "running",
    "attention",
    "packing",
    "blocks",
    "logprobs",
    "decoding",
    "sharding",
    "lightning_features",
    "peers",
    "needs",
    "position",
    "saved_state",
    "checkpoints",
    "provenance",
    "quantization",
    "lora_linear",
    "row_norm",
    "compilation",
    "model_options",
    "model_files",
    "loading",
    "policy",
    "metrics",
    "reference",
    "objectives",
    "data",
    "evaluation",
    "reporting",
    "model_card",
    "export",
    "hub",
    "callbacks",
    "cli",
    "__main__",
]
LONGEST_FILE, LONGEST_CLASS, LONGEST_TEST_NAME = 400, 300, 70

Circle = tuple[str, ...]


def modules(package: Path) -> dict[str, Path]:
    """Each module of a package by its dotted name."""
    names = {path: ".".join(path.relative_to(package.parent).with_suffix("").parts) for path in package.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imported(path: Path, name: str, known: set[str]) -> Iterator[tuple[str, str]]:
    """The modules that a file imports anywhere, inside functions too, and the name that it takes from each."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                if f"{source}.{alias.name}" in known:
                    yield f"{source}.{alias.name}", ""
                elif source in known:
                    yield source, alias.name


def graph(package: Path) -> dict[str, set[str]]:
    """The modules that each module imports, itself left out. An import runs the packages of what it imports first."""
    files = modules(package)
    lazy = {name for name, path in files.items() if "lazy_exports(__name__)" in path.read_text()}
    edges = {}
    for name, path in files.items():
        named = {to for to, _ in imported(path, name, set(files))}
        around = {above for to in named for above in packages_of(to)} - lazy - packages_of(name)
        edges[name] = (named | around) - {name}
    return edges


def packages_of(name: str) -> set[str]:
    """The packages that a module is in."""
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts))}


def circles(edges: dict[str, set[str]]) -> list[Circle]:
    """The strongly connected components of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[Circle] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(edges[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            position = stack.index(name)
            if len(stack) - position > 1:
                found.append(tuple(sorted(stack[position:])))
            del stack[position:]

    for name in sorted(edges):
        if name not in index:
            visit(name)
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_no_module_imports_itself_by_way_of_others():
    found = {f"{circle[0]} imports itself by way of {', '.join(circle[1:])}" for circle in circles(graph(PACKAGE))}
    assert sorted(found) == []


def test_every_import_runs_down_the_layers():
    assert {room(name) for name in modules(PACKAGE)} - {""} <= set(LAYERS), "a new room needs its place in LAYERS"
    upward = {
        f"{name} imports {other}"
        for name, others in graph(PACKAGE).items()
        for other in others
        if room(name) and room(other) and LAYERS.index(room(other)) > LAYERS.index(room(name))
    }
    assert sorted(upward) == []


def test_no_private_name_is_imported_from_another_module():
    files = modules(PACKAGE)
    private = {
        f"{name} imports {other}.{taken}"
        for name, path in files.items()
        for other, taken in imported(path, name, set(files))
        if taken.startswith("_") and not taken.startswith("__")
    }
    assert sorted(private) == []


def test_no_file_and_no_class_is_too_long():
    long = set()
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        lines = text.count("\n")
        if lines > LONGEST_FILE:
            long.add(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > LONGEST_CLASS:
                    long.add(f"{path.relative_to(ROOT)}, {node.name}: {length} lines")
    assert sorted(long) == []


def test_the_names_of_tests_are_short():
    long = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and len(node.name) >= LONGEST_TEST_NAME
    }
    assert long == set()


@pytest.mark.parametrize(
    "line",
    ["from app.top import run", "import app.top", "from . import top", "from .top import run", "from app import top"],
)
def test_an_import_inside_a_function_closes_a_circle(line, tmp_path):
    package = tmp_path / "app"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "top.py").write_text("import app.bottom\n\n\ndef run(): ...\n")
    (package / "bottom.py").write_text("x = 1\n")
    assert circles(graph(package)) == []
    (package / "bottom.py").write_text(f"def later():\n    {line}\n")
    assert circles(graph(package)) == [("app.bottom", "app.top")]
