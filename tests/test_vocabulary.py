"""No name that was replaced comes back, and the prose does without two words that hid what is meant."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import old_names
import pytest
from paths import ROOT

import cluscomp_jax

CODE = ("cluscomp_jax", "pallas_kernels", "scripts", "tests")
LISTS = ("tests/helpers/old_names.py", "tests/test_vocabulary.py")
PROSE = (*CODE, "configs", "examples", "README.md", "docs", "CONTRIBUTING.md", "CHANGELOG.md")
"""Folders and files without the words of `WORDS`; names in code between backticks of a document are no words."""
WORDS = re.compile(r"\b(behind|beside)\b", re.IGNORECASE)
TEXTS = (".py", ".md", ".toml", ".sh", ".j2")
DISTINCT = {"fast_gradients", "materialize", "outlier_limit", "refits", "vector_rate"}
"""Settings whose old names nothing else has: no identifier is one of them."""
IDENTIFIERS = old_names.NAMES.keys() | DISTINCT
TABLE = "### Renamed before the first release"


def files(*roots: str) -> list[str]:
    """Returns the text files at or below the roots, by their paths in the checkout, less the lists of old names."""
    found: set[Path] = set()
    for root in (ROOT / name for name in roots):
        found |= {root} if root.is_file() else {file for file in root.rglob("*") if file.suffix in TEXTS}
    return sorted(name for file in found if (name := file.relative_to(ROOT).as_posix()) not in LISTS)


def numbered(text: str) -> Iterator[tuple[str, int]]:
    """Yields (line, its number)."""
    for number, line in enumerate(text.splitlines(), start=1):
        yield line, number


def names_of_python(source: str) -> Iterator[tuple[str, int]]:
    """Yields (old name, line number) of the identifiers and keys of a Python file."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.string in IDENTIFIERS:
            yield token.string, token.start[0]
    for node in ast.walk(ast.parse(source)):
        for key in keys_of(node):
            if key in old_names.SETTINGS.keys() | IDENTIFIERS and key not in old_names.ON_DISK:
                yield key, getattr(node, "lineno", 0)


def keys_of(node: ast.AST) -> list[str]:
    """Returns the keys, keyword arguments and annotated names that the node itself has."""
    if isinstance(node, ast.Dict):
        return [key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
        return [node.slice.value]
    if isinstance(node, ast.keyword):
        return [node.arg or ""]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def names_of_prose(text: str) -> Iterator[tuple[str, int]]:
    """Yields (old name, line number) of code in Markdown, TOML or shell: identifiers, and keys that get a value."""
    for line, number in numbered(text):
        for name in re.findall(r"\b[A-Za-z_]\w*\b", line):
            in_code = "_" in name or f"`{name}" in line or f".{name}" in line
            if name in IDENTIFIERS and in_code and name not in old_names.ON_DISK:
                yield name, number
        for name in re.findall(r"(?:^|`)\s*(\w+)\s*=(?!=)", line):
            if name in old_names.SETTINGS:
                yield name, number


def modules_and_options(text: str) -> Iterator[tuple[str, int]]:
    """Yields (old name, line number) of modules by their dotted names, and of command-line options."""
    for line, number in numbered(text):
        for dotted in re.findall(r"\bcluscomp_jax\.([a-z_]\w*(?:\.[a-z_]\w*)*)", line):
            if old := old_module(dotted):
                yield f"cluscomp_jax.{old}", number
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", line):
            if option in old_names.OPTIONS:
                yield option, number


def old_module(dotted: str) -> str | None:
    """Returns the old module that a dotted name below cluscomp_jax begins with; a public name is no module."""
    parts = dotted.split(".")
    if parts[0] in cluscomp_jax.__all__:
        return None
    return next((old for i in range(len(parts)) if (old := ".".join(parts[: i + 1])) in old_names.MODULES), None)


def imported_modules(source: str) -> Iterator[tuple[str, int]]:
    """Yields (old module, line number) of `from cluscomp_jax.x import y`, where x.y was a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "cluscomp_jax":
            package = (node.module or "").partition(".")[2]
            for alias in node.names:
                if old := old_module(f"{package}.{alias.name}".lstrip(".")):
                    yield f"cluscomp_jax.{old}", node.lineno


def offences(name: str, text: str) -> list[str]:
    """Returns "file:line: old name; it is new now" of every old name in a file."""
    python = name.endswith(".py")
    found = {*modules_and_options(text), *(names_of_python(text) if python else names_of_prose(text))}
    found |= set(imported_modules(text)) if python else set()
    return [f"{name}:{line}: {old}" for old, line in sorted(found, key=lambda offence: (offence[1], offence[0]))]


@pytest.mark.parametrize("root", [*CODE, "README.md", "docs", "configs"])
def test_no_old_name_is_used(root: str) -> None:
    found = [offence for name in files(root) for offence in offences(name, (ROOT / name).read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("root", PROSE)
def test_words_that_hide_a_relation_are_not_used(root: str) -> None:
    found = [
        f"{name}:{number}: {line.strip()}"
        for name in files(root)
        for line, number in numbered((ROOT / name).read_text(encoding="utf-8"))
        if WORDS.search(re.sub(r"`[^`]*`", "", line) if name.endswith(".md") else line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", "from cluscomp_jax import settings"),
        ("a.py", "from cluscomp_jax.io.checkpoint import open_checkpoint"),
        ("a.py", "import cluscomp_jax.trees"),
        ("a.py", "x = Examples(tokens)"),
        ("a.py", "source.load_rest()"),
        ("a.py", 'search["forest"]'),
        ("a.py", 'alone = {"feedback": False}'),
        ("a.py", "compress(params, share='site')"),
        ("a.py", 'main(["--mixed", "matrix"])'),
        ("a.md", "`cluscomp compress --share block`"),
        ("a.md", "It returns `Examples`."),
        ("a.md", "see `cluscomp_jax.lm_eval`"),
        ("a.toml", "outlier_limit = 4.0"),
        ("a.toml", "refits = 3"),
    ],
)
def test_an_old_name_is_found(name: str, text: str) -> None:
    assert len(offences(name, text)) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", "from cluscomp_jax.config.clustering import ClusterConfig"),
        ("a.py", "starts = [span.first for span in spans]"),
        ("a.py", 'fields["codebook_of"], CONTENT_FOLDERS == ("rest",)'),
        ("a.py", 'main(["--mixed-precision", "per_matrix"])'),
        ("a.md", "Examples: the share of a site is 3%. `--mixed-precision none`"),
        ("a.toml", "refine_rounds = 3"),
    ],
)
def test_other_names_are_left_alone(name: str, text: str) -> None:
    assert offences(name, text) == []


def test_the_change_log_has_every_old_name_with_its_new_one() -> None:
    section = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split(TABLE, 1)[1].split("\n##", 1)[0]
    rows = set(re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", section, re.MULTILINE))
    modules = {f"cluscomp_jax.{old}": f"cluscomp_jax.{new}" for old, new in old_names.MODULES.items()}
    missing = (modules | old_names.NAMES | old_names.SETTINGS | old_names.OPTIONS).items() - rows
    assert not missing
