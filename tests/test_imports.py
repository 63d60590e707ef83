"""Holds every import of the two packages to the layer table in docs/design.md."""

import ast
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

PACKAGES = ("cluscomp_jax", "pallas_kernels")
CORE = {"jax", "jaxlib", "ml_dtypes", "numpy", "scipy", "optax", "flax", "orbax"}
"""The modules of others that the core installs."""
TRITON = "jax.experimental.pallas.triton"


def read_table(document: str) -> dict[str, int]:
    """Returns {dotted name: rank} of the rows of the table under "## Layers"; a smaller rank may be imported."""
    section = document.split("## Layers", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    names = [row if row in PACKAGES else f"cluscomp_jax.{row}" for row in rows]
    assert len(set(names)) == len(names) > 0
    return {name: rank for rank, name in enumerate(names)}


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


def row_of(module: str, table: dict[str, int]) -> str | None:
    """Returns the table's row for a module. The bare name cluscomp_jax covers the package's __init__ alone."""
    parts = module.split(".")
    row = ".".join(parts[:1] if parts[0] != "cluscomp_jax" else parts[:2])
    return row if row in table else None


def find_offences(root: Path, table: dict[str, int]) -> list[str]:
    """Returns one sentence per import that the table forbids and per file that it does not place."""
    modules = find_modules(root)
    offences = []
    for name, file in modules.items():
        importer = row_of(name, table)
        if importer is None:
            offences.append(f"{file.relative_to(root)} is on no row of the layer table")
            continue
        for target, number in imported_names(name, file):
            module = resolve(target, modules)
            row = row_of(module, table) if module else None
            if row and table[row] > table[importer]:
                offences.append(f"{file.relative_to(root)}:{number} imports {module}, of the lower row {row}")
    return offences


def private_names(name: str, file: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Yields one sentence per private name of another module of ours that the file takes."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    ours = {target.rpartition(".")[2] for target, _ in imported_names(name, file) if target in modules}
    aliases = {
        alias.asname: alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    ours |= {str(asname) for asname, original in aliases.items() if asname and original in ours}
    for target, number in imported_names(name, file):
        last = target.rpartition(".")[2]
        if last.startswith("_") and target not in modules and resolve(target, modules) not in (None, name):
            yield f"{file}:{number} imports {target}"
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in ours
            and re.match("_[^_]", node.attr)
        ):
            yield f"{file}:{node.lineno} takes {node.value.id}.{node.attr}"


def import_graph(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Returns {module: modules of ours it imports}."""
    return {
        name: {
            found for target, _ in imported_names(name, file) if (found := resolve(target, modules)) and found != name
        }
        for name, file in modules.items()
    }


@pytest.fixture(scope="module")
def table() -> dict[str, int]:
    return read_table((ROOT / "docs" / "design.md").read_text(encoding="utf-8"))


def test_every_import_follows_the_layer_table(table: dict[str, int]) -> None:
    offences = find_offences(ROOT, table)
    assert not offences, "\n".join(offences)


def test_every_row_of_the_table_is_a_folder_or_a_module_of_the_top(table: dict[str, int]) -> None:
    modules = find_modules(ROOT)
    assert not [name for name in table if name not in modules]
    flat = {file.stem for file in (ROOT / "cluscomp_jax").glob("*.py")} - {"__init__", "__main__", "_version"}
    assert len(flat) <= 6, flat


def test_no_module_takes_a_private_name_of_another() -> None:
    modules = find_modules(ROOT)
    assert not [offence for name, file in modules.items() for offence in private_names(name, file, modules)]


@pytest.mark.parametrize(
    "source",
    [
        "from cluscomp_jax.a import _x\n",
        "from cluscomp_jax import a\na._x\n",
        "from cluscomp_jax import a as b\nb._x\n",
    ],
)
def test_a_private_name_is_found(tmp_path: Path, source: str) -> None:
    package = tmp_path / "cluscomp_jax"
    package.mkdir()
    (package / "a.py").write_text("_x = 1\n")
    (package / "b.py").write_text(source)
    modules = find_modules(tmp_path)
    assert len(list(private_names("cluscomp_jax.b", package / "b.py", modules))) == 1


def bare_imports(file: Path) -> Iterator[tuple[str, int]]:
    """Yields (module of an extra, line number) of what is imported outside `with needed_for(…)`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    known = CORE | set(PACKAGES) | sys.stdlib_module_names
    guards = [
        node for node in ast.walk(tree) if isinstance(node, ast.With) and "needed_for(" in ast.unparse(node.items[0])
    ]
    guards += [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    guarded = {id(inner) for guard in guards for inner in ast.walk(guard)}
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        yield from ((name, node.lineno) for name in names if name.partition(".")[0] not in known)


def test_what_an_extra_installs_is_imported_where_its_absence_is_one_line() -> None:
    files = find_modules(ROOT).values()
    bare = [f"{file.relative_to(ROOT)}:{line} imports {name}" for file in files for name, line in bare_imports(file)]
    assert not bare, "\n".join(bare)


def test_a_planted_bare_import_is_found(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(
        "import gguf\nimport json\nwith needed_for('x', 'hf'):\n    import tyro\ndef f():\n    from rich.a import b\n"
    )
    assert sorted(bare_imports(file)) == [("gguf", 1), ("rich.a", 6)]


def test_the_tests_lie_in_the_folders_of_what_they_test(table: dict[str, int]) -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    rows = {name.removeprefix("cluscomp_jax.") for name in table}
    assert folders - rows == {"fixtures", "helpers", "parity", "scripts"}
    packages = {name for name in rows if (ROOT / "cluscomp_jax" / name).is_dir()}
    assert packages <= folders


def test_no_import_is_circular() -> None:
    graphlib.TopologicalSorter(import_graph(find_modules(ROOT))).prepare()


def test_kernels_know_nothing_of_the_package() -> None:
    modules = {name: file for name, file in find_modules(ROOT).items() if name.startswith("pallas_kernels")}
    targets = {target for name, file in modules.items() for target, _ in imported_names(name, file)}
    assert not [target for target in targets if target.split(".")[0] == "cluscomp_jax"]


@pytest.mark.parametrize("name", ["clustering", "tuning", "training", "evaluation", "inference"])
def test_what_sees_a_model_knows_no_family(name: str) -> None:
    modules = find_modules(ROOT)
    rooms = {module: file for module, file in modules.items() if f"{module}.".startswith(f"cluscomp_jax.{name}.")}
    targets = {target for module, file in rooms.items() for target, _ in imported_names(module, file)}
    assert rooms
    assert not [target for target in targets if f"{target}.".startswith("cluscomp_jax.models.llama.")]


def test_at_most_one_file_imports_the_triton_backend() -> None:
    importers = [
        name
        for name, file in find_modules(ROOT).items()
        if any(f"{target}.".startswith(f"{TRITON}.") for target, _ in imported_names(name, file))
    ]
    assert len(importers) <= 1, importers
    assert all(name.startswith("pallas_kernels.") for name in importers), importers


PLANTED = {
    "upward": ("low.py", "from cluscomp_jax.high import f\n", "low.py:1 imports cluscomp_jax.high"),
    "inside a function": ("low.py", "def f():\n    import cluscomp_jax.high\n", "low.py:2 imports cluscomp_jax.high"),
    "by a package's attribute": ("low.py", "from cluscomp_jax import high\n", "imports cluscomp_jax.high"),
    "relative": ("low.py", "from . import high\n", "imports cluscomp_jax.high"),
    "into a folder": ("high.py", "from cluscomp_jax.part import deep\n", "imports cluscomp_jax.part"),
    "from inside a folder": ("part/deep.py", "from ..top import f\n", "part/deep.py:1 imports cluscomp_jax.top"),
    "unplaced": ("stray.py", "", "cluscomp_jax/stray.py is on no row"),
}


@pytest.mark.parametrize(("file", "source", "offence"), PLANTED.values(), ids=PLANTED)
def test_a_planted_offence_is_found(tmp_path: Path, file: str, source: str, offence: str) -> None:
    package = tmp_path / "cluscomp_jax"
    (package / "part").mkdir(parents=True)
    for name in ("low.py", "high.py", "top.py", "part/__init__.py"):
        (package / name).touch()
    (package / "part" / "deep.py").write_text("import jax\nfrom cluscomp_jax import low\nfrom ..high import f\n")
    table = read_table(
        "## Layers\n" + "".join(f"| `{row}` | |\n" for row in ("low", "high", "part", "top", "cluscomp_jax"))
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
