"""Holds every import of the two packages to the layer table in docs/design.md."""

import ast
import dataclasses
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cluscomp_jax", "pallas_kernels")
TRITON = "jax.experimental.pallas.triton"


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table; `rank` counts lines from the top, so that a smaller rank may be imported."""

    name: str
    layer: int
    rank: int


def read_table(document: str) -> dict[str, Line]:
    """Returns {module name: line} of the first code block under "## Layers"."""
    block = document.split("## Layers", 1)[1].split("```", 2)[1]
    table: dict[str, Line] = {}
    layer = -1
    for row in block.strip().splitlines():
        match = re.fullmatch(r"(?:L(\d+))?\s+([\w.]+)", row if row.startswith("L") else f" {row}")
        assert match, f"the layer table has a row that is neither 'L<n> module' nor '   module': {row!r}"
        layer = int(match[1]) if match[1] else layer
        assert match[2] not in table, f"{match[2]} stands twice in the layer table"
        table[match[2]] = Line(match[2], layer, len(table))
    assert [line.layer for line in table.values()] == sorted(line.layer for line in table.values())
    return table


def find_modules(root: Path) -> dict[str, Path]:
    """Returns {dotted name: file} of the two packages; a package's name stands for its __init__."""
    modules = {}
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return modules


def imported_names(name: str, file: Path) -> Iterator[tuple[str, int]]:
    """Yields (dotted name, line number) of everything the file imports, wherever the statement stands."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            yield from ((f"{origin}.{alias.name}", node.lineno) for alias in node.names)


def resolve(name: str, modules: dict[str, Path]) -> str | None:
    """Returns the module of ours that holds `name`, None where it is somebody else's."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def line_of(module: str, table: dict[str, Line]) -> Line | None:
    """Returns the table's line for a module. The bare name cluscomp_jax covers the package's __init__ alone."""
    name = module
    while name and (name not in table or (name == "cluscomp_jax" != module)):
        name = name.rpartition(".")[0]
    return table.get(name)


def find_offences(root: Path, table: dict[str, Line]) -> list[str]:
    """Returns one sentence per import that the table forbids and per file that it does not place."""
    modules = find_modules(root)
    offences = []
    for name, file in modules.items():
        importer = line_of(name, table)
        if importer is None:
            offences.append(f"{file.relative_to(root)} is on no line of the layer table")
            continue
        for target, number in imported_names(name, file):
            module = resolve(target, modules)
            line = line_of(module, table) if module else None
            if line and line.rank > importer.rank:
                where = f"{file.relative_to(root)}:{number} (L{importer.layer})"
                offences.append(f"{where} imports {module} (L{line.layer}), a line below")
    return offences


def import_graph(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Returns {module: modules of ours it imports}."""
    return {
        name: {
            found for target, _ in imported_names(name, file) if (found := resolve(target, modules)) and found != name
        }
        for name, file in modules.items()
    }


@pytest.fixture(scope="module")
def table() -> dict[str, Line]:
    return read_table((ROOT / "docs" / "design.md").read_text(encoding="utf-8"))


def test_every_import_follows_the_layer_table(table: dict[str, Line]) -> None:
    offences = find_offences(ROOT, table)
    assert not offences, "\n".join(offences)


def test_every_line_of_the_table_is_a_module(table: dict[str, Line]) -> None:
    modules = find_modules(ROOT)
    assert not [name for name in table if name not in modules]


def test_no_import_is_circular() -> None:
    graphlib.TopologicalSorter(import_graph(find_modules(ROOT))).prepare()


def test_kernels_know_nothing_of_the_package() -> None:
    modules = {name: file for name, file in find_modules(ROOT).items() if name.startswith("pallas_kernels")}
    targets = {target for name, file in modules.items() for target, _ in imported_names(name, file)}
    assert not [target for target in targets if target.split(".")[0] == "cluscomp_jax"]


@pytest.mark.parametrize("name", ["statistics", "tuning", "training", "evaluate", "generation"])
def test_what_sees_a_model_knows_no_family(name: str) -> None:
    modules = find_modules(ROOT)
    rooms = {module: file for module, file in modules.items() if f"{module}.".startswith(f"cluscomp_jax.{name}.")}
    targets = {target for module, file in rooms.items() for target, _ in imported_names(module, file)}
    assert rooms
    assert not [target for target in targets if f"{target}.".startswith("cluscomp_jax.llama.")]


def test_at_most_one_file_imports_the_triton_backend() -> None:
    importers = [
        name
        for name, file in find_modules(ROOT).items()
        if any(f"{target}.".startswith(f"{TRITON}.") for target, _ in imported_names(name, file))
    ]
    assert len(importers) <= 1, importers
    assert all(name.startswith("pallas_kernels.") for name in importers), importers


PLANTED = {
    "upward": (
        "low.py",
        "from cluscomp_jax.high import f\n",
        "cluscomp_jax/low.py:1 (L0) imports cluscomp_jax.high (L1)",
    ),
    "inside a function": ("low.py", "def f():\n    import cluscomp_jax.high\n", "cluscomp_jax/low.py:2 (L0)"),
    "by a package's attribute": ("low.py", "from cluscomp_jax import high\n", "imports cluscomp_jax.high"),
    "relative": ("low.py", "from . import high\n", "imports cluscomp_jax.high"),
    "down its own layer": ("high.py", "from cluscomp_jax.part import deep\n", "imports cluscomp_jax.part"),
    "from inside a folder": (
        "part/deep.py",
        "from ..top import f\n",
        "cluscomp_jax/part/deep.py:1 (L1) imports cluscomp_jax.top",
    ),
    "unplaced": ("stray.py", "", "cluscomp_jax/stray.py is on no line"),
}


@pytest.mark.parametrize(("file", "source", "offence"), PLANTED.values(), ids=PLANTED)
def test_a_planted_offence_is_found(tmp_path: Path, file: str, source: str, offence: str) -> None:
    package = tmp_path / "cluscomp_jax"
    (package / "part").mkdir(parents=True)
    for name in ("low.py", "high.py", "top.py", "part/__init__.py"):
        (package / name).touch()
    (package / "part" / "deep.py").write_text("import jax\nfrom cluscomp_jax import low\nfrom ..high import f\n")
    table = read_table(
        "## Layers\n```\nL0 cluscomp_jax.low\nL1 cluscomp_jax.high\n   cluscomp_jax.part\nL2 cluscomp_jax.top\n```"
    )
    assert find_offences(tmp_path, table) == []
    (package / file).write_text(source)
    (found,) = find_offences(tmp_path, table)
    assert offence in found


def test_a_planted_circle_is_found(tmp_path: Path) -> None:
    package = tmp_path / "cluscomp_jax"
    package.mkdir()
    (package / "a.py").write_text("from cluscomp_jax import b\n")
    (package / "b.py").write_text("def f():\n    from cluscomp_jax.a import g\n")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(import_graph(find_modules(tmp_path))).prepare()
