"""save and load: any pytree comes back, whole, and what does not fit is one line."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st
from random_trees import codebook_arrays, same
from small_trees import Layer, Net, linen_variables
from toy_checkpoint import ToyConfig, ToyRun, toy_params

from cluscomp_jax import CodebookArray, CompressionRule, InputError, abstract, cluster_tree, load, save, save_checkpoint
from cluscomp_jax.checkpoint import orbax_items
from cluscomp_jax.checkpoint.reader import open_checkpoint
from cluscomp_jax.core import pytrees
from cluscomp_jax.core.host_axes import HostAxes
from cluscomp_jax.runtime import json_files

CONFIG = ToyConfig()
RULES = [
    CompressionRule(pattern="q", num_codes=16, axes="d l n h -> l | d | n h"),
    CompressionRule(pattern="up", num_codes=300, group_size=1, axis="in"),
]


def normal(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def dense():
    return {"q": normal(16, 3, 2, 8), "up": normal(48, 32), "norm": jnp.ones(8, jnp.bfloat16), "step": np.int32(7)}


def tree():
    return cluster_tree(dense(), RULES)


def assert_same(found, expected):
    found, expected = dict(pytrees.iterate(found)), dict(pytrees.iterate(expected))
    assert found.keys() == expected.keys()
    assert not [path for path in expected if not same(found[path], expected[path])]


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.lists(codebook_arrays(), min_size=1, max_size=4))
def test_codebooks_of_any_rank_and_stack_come_back(tmp_path_factory, arrays):
    out = tmp_path_factory.mktemp("tree") / "out"
    tree = {"layers": arrays}
    save(out, tree)
    assert_same(load(out), tree)
    assert_same(load(out, like=tree), tree)
    shutil.rmtree(out)


DTYPES = (
    "bool", "int4", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "bfloat16",
    "float32", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
    "float8_e5m2fnuz", "float8_e4m3b11fnuz", "float8_e3m4", "float8_e8m0fnu", "float4_e2m1fn",
)  # fmt: skip


def test_dense_arrays_of_every_dtype_come_back(tmp_path):
    numbers = np.arange(6).reshape(2, 3) % 2
    tree = {name: numbers.astype(np.dtype(getattr(ml_dtypes, name, name))) for name in DTYPES}
    tree |= {"empty": np.zeros((0, 3), np.float32), "scalar": np.asarray(2.5), "swapped": np.arange(3, dtype=">i4")}
    save(tmp_path / "out", {**tree, "python": [True, 3, 2.5]})
    found = load(tmp_path / "out")
    assert [found["python"][str(i)][()] for i in range(3)] == [True, 3, 2.5]
    tree["swapped"] = np.arange(3, dtype="i4")
    assert_same({**found, "python": {}}, tree)
    like = load(tmp_path / "out", like={**tree, "python": [False, 0, 0.0]})["python"]
    assert [(type(value), value) for value in like] == [(bool, True), (int, 3), (float, 2.5)]


TREES = {
    "lists in dicts": ({"a": [normal(8, 12)], "b": 3}, "a/0"),
    "integer keys": ({0: {"w": normal(8, 12)}}, "0/w"),
    "keys of file names": ({"..": {"a/b": normal(8, 12), "c.d": np.ones(2)}, "_METADATA": np.ones(2)}, "../a/b"),
    "a dataclass": (Layer(jnp.asarray(normal(8, 12)), jnp.ones(12), "x"), "w"),
    "an nnx module": (Net(), "layers/1/kernel"),
    "an nnx state": (nnx.state(Net()), "layers/0/kernel"),
    "a linen box": (linen_variables(), "params/kernel"),
    "one array": (normal(8, 12), ""),
}


@pytest.mark.parametrize("name", TREES)
def test_like_gives_the_structure_back(tmp_path, name):
    original, path = TREES[name]
    rules = [CompressionRule(pattern=path or ".*", num_codes=16)]
    saved = cluster_tree(original, rules)
    save(tmp_path / "out", saved)
    for like in (saved, original, abstract(original, rules)):
        found = load(tmp_path / "out", like=like)
        assert path == "" or type(found) is type(like)
        assert jax.tree.structure(found) == jax.tree.structure(saved)
        assert_same(found, saved)


def test_kernels_that_share_a_codebook_come_back(tmp_path):
    owner = tree()["up"]
    other = dataclasses.replace(owner, index=owner.index[::-1].copy(), tied_to="k")
    blocks = {"blocks": [{"k": owner, "v": other}, {"k": owner, "v": other}]}
    save(tmp_path / "out", blocks)
    assert_same(load(tmp_path / "out", like=blocks), blocks)
    assert not (tmp_path / "out/arrays/tree.blocks.0.v.codebook").exists()
    listed = json.loads((tmp_path / "out/tree.json").read_text())["matrices"]["blocks/1/v"]
    assert (listed["codebook_of"], listed["codebook_at"]) == ("k", "blocks/1/k")
    changed = dataclasses.replace(other, codebook=owner.codebook + np.ones_like(owner.codebook))
    with pytest.raises(InputError, match="the codebook of v is not that of k"):
        save(tmp_path / "no", {"k": owner, "v": changed})
    with pytest.raises(InputError, match="'k', which stores none"):
        save(tmp_path / "no", {"v": other})


def test_a_models_checkpoint_is_read_too(tmp_path):
    save_checkpoint(tmp_path / "out", toy_params(CONFIG), ToyRun())
    assert_same(load(tmp_path / "out"), toy_params(CONFIG))
    assert_same(load(tmp_path / "out", like=toy_params(CONFIG)), toy_params(CONFIG))
    save(tmp_path / "tree", {"w": np.ones(2)})
    with pytest.raises(InputError, match=r"read it with cluscomp_jax\.load"):
        open_checkpoint(tmp_path / "tree")


def test_a_models_checkpoint_takes_plain_matrices_alone(tmp_path):
    params = toy_params(CONFIG)
    query = params["model"]["layers"]["1"]["attn"]["q"]
    query["kernel"] = dataclasses.replace(query["kernel"], host=HostAxes((12, 12), (1, 0), 1))
    with pytest.raises(InputError, match="is no plain matrix"):
        save_checkpoint(tmp_path / "out", params, ToyRun())


def test_dtype_casts_what_is_floating(tmp_path):
    save(tmp_path / "out", tree())
    found = load(tmp_path / "out", dtype="bfloat16", like=dense())
    assert found["q"].dtype == found["q"].codebook.dtype == found["norm"].dtype == jnp.bfloat16
    assert found["step"].dtype == np.int32
    assert np.asarray(found["q"]).dtype == jnp.bfloat16
    with pytest.raises(InputError, match="dtype is int8"):
        load(tmp_path / "out", dtype=np.int8)
    save(tmp_path / "large", {"w": np.float32([1e9, np.inf])})
    with pytest.raises(InputError, match="w has numbers beyond the range of float16"):
        load(tmp_path / "large", dtype=jnp.float16)


BAD_LEAVES = {
    "a string": ("x", "a/0 is a str, no array"),
    "a function": (jnp.tanh, "no array"),
    "a shape": (jax.ShapeDtypeStruct((2,), np.float32), "which has no numbers"),
    "a key": (jax.random.key(0), r"store jax\.random\.key_data"),
    "objects": (np.asarray([None]), "dtype object cannot be stored"),
    "a dtype": (np.zeros(2, ml_dtypes.uint4), "dtype uint4 cannot be stored"),
    "an index out of range": (
        CodebookArray(np.ones((2, 4), np.float16), np.full((2, 2), 2, np.uint8), (2, 8)),
        "code 2",
    ),
    "shapes": (
        abstract({"w": normal(8, 12)}, [CompressionRule(pattern="w", num_codes=8)])["w"],
        "which has no numbers",
    ),
    "no matrices": (CodebookArray(np.ones((0, 2, 4), np.float16), np.ones((0, 2, 2), np.uint8), (2, 8)), "is empty"),
}


@pytest.mark.parametrize("name", BAD_LEAVES)
def test_what_cannot_be_stored_is_one_line_and_leaves_nothing(tmp_path, name):
    leaf, message = BAD_LEAVES[name]
    with pytest.raises(InputError, match=message) as error:
        save(tmp_path / "out", {"a": [leaf]})
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_paths_that_cannot_be_told_apart_are_refused(tmp_path):
    for bad, message in (
        ({"a": {"b": np.ones(2)}, "a/b": np.ones(2)}, "two leaves of the tree have the path 'a/b'"),
        ({"w": tree()["up"], "w/index": np.ones(2)}, "w/index"),
        ({}, "has no array"),
        ({"a" * 250: np.ones(2)}, "too long"),
    ):
        with pytest.raises(InputError, match=message):
            save(tmp_path / "out", bad)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    save(tmp_path / "out", {"w": np.ones(2)})
    for place in (tmp_path / "out", tmp_path / "out/arrays/more", tmp_path / "no/out"):
        with pytest.raises(InputError, match=r"not empty|is inside the checkpoint|does not exist"):
            save(place, {"w": np.zeros(2)})
    np.testing.assert_array_equal(load(tmp_path / "out")["w"], np.ones(2))


LIKES = {
    "a path too many": ({**dense(), "more": normal(2)}, r"like has 'more', which the folder has not"),
    "a path too few": ({"q": dense()["q"]}, r"the folder has 'norm', 'step', 'up', which like has not"),
    "another shape": ({**dense(), "norm": jnp.ones(9, jnp.bfloat16)}, r"norm has shape \(8,\), in like it has \(9,\)"),
    "another dtype": ({**dense(), "norm": jnp.ones(8, jnp.float16)}, "norm is bfloat16, in like it is float16"),
    "another dtype of a kernel": ({**dense(), "q": jnp.ones((16, 3, 2, 8), jnp.float16)}, "q is float32"),
    "another kind": ({**dense(), "norm": "x"}, "norm is an array, in like it is a str"),
    "a kernel for an array": (
        {**dense(), "norm": CodebookArray(np.ones((2, 4)), np.zeros((8, 1), np.uint8), (8, 4))},
        "norm is a dense array, in like it is clustered",
    ),
    "other codes": (
        abstract(dense(), [dataclasses.replace(RULES[0], num_codes=8), RULES[1]]),
        "q has codes 16, in like 8",
    ),
    "other axes": (
        abstract(dense(), [dataclasses.replace(RULES[0], axes="d l n h -> l | d n | h"), RULES[1]]),
        r"q has matrix shape \(16, 16\), in like \(32, 8\)",
    ),
}


@pytest.mark.parametrize("name", LIKES)
def test_a_like_that_does_not_fit_is_one_line(tmp_path, monkeypatch, name):
    like, message = LIKES[name]
    save(tmp_path / "out", tree())
    monkeypatch.setattr(orbax_items, "read_item", lambda *_: pytest.fail("an item was read"))
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path / "out", like=like)
    assert "\n" not in str(error.value)


def forge(root, change):
    """Changes tree.json and makes its own checksum right again."""
    fields = json.loads((root / "tree.json").read_text())
    change(fields)
    del fields["sha256"]
    (root / "tree.json").write_text(json.dumps({**fields, "sha256": json_files.digest(fields)}))


def one_code(fields):
    """A matrix of one code, whose index has no bytes on disk."""
    entry = fields["matrices"]["up"]
    entry.update(shape=[2**16, 2**16], num_codes=1, index_bits=0, bits_per_weight=16 / 2**32)
    entry["host"]["shape"] = [2**16, 2**16]
    bits = fields["matrices"]["q"]["bits_per_weight"] * 768 + 16
    fields["totals"].update(matrix_weights=2**32 + 768, matrix_bits=round(bits), bits_per_weight=bits / (2**32 + 768))


FILE = {"size": 1, "sha256": "0" * 64}
FORGERIES = {
    "a version": (lambda f: f.update(format_version=3), "format version 3 is newer"),
    "a version of text": (lambda f: f.update(format_version="1"), "this is no tree"),
    "a large matrix": (one_code, r"would take [\d,]+ bytes of memory"),
    "a large array": (lambda f: f["tensors"]["norm"].update(shape=[2**34]), "do not follow"),
    "a shape beyond all": (lambda f: f["tensors"]["norm"].update(shape=[2**40, 2**40]), "no array has so many"),
    "many axes": (lambda f: f["tensors"]["norm"].update(shape=[1] * 70), "70 sizes"),
    "a negative size": (lambda f: f["tensors"]["norm"].update(shape=[-1]), "at least 0"),
    "a stack": (lambda f: f["matrices"]["q"].update(stack=[0]), "at least 1"),
    "an order": (lambda f: f["matrices"]["q"]["host"].update(order=[0, 1, 1]), "are no axes of"),
    "a stack too far": (lambda f: f["matrices"]["q"]["host"].update(stack_at=3), "are no axes of"),
    "a host of another shape": (lambda f: f["matrices"]["q"]["host"].update(shape=[16, 2, 9]), "the host's axes make"),
    "a host's dtype": (lambda f: f["matrices"]["q"]["host"].update(dtype="int8"), "dtype is 'int8'"),
    "a dtype": (lambda f: f["tensors"]["norm"].update(dtype="object"), "dtype is 'object'"),
    "a file outside": (
        lambda f: f["files"].update({"arrays/../x": {"size": 1, "sha256": "0" * 64}}),
        "is not in arrays",
    ),
    "a file that is absent": (
        lambda f: f["files"].update({"arrays/x": {"size": 1, "sha256": "0" * 64}}),
        "totals, sha256 do not follow",
    ),
    "an owner": (lambda f: f["matrices"]["up"].update({"codebook_of": "q"}), "stores none of"),
    "a key": (lambda f: f.update(more=1), "more do not follow"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_tree_is_refused_before_anything_is_read(tmp_path, monkeypatch, name):
    change, message = FORGERIES[name]
    save(tmp_path / "out", tree())
    forge(tmp_path / "out", change)
    monkeypatch.setattr(orbax_items, "read_item", lambda *_: pytest.fail("an item was read"))
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path / "out")
    assert "\n" not in str(error.value)


def test_damage_is_one_line(tmp_path):
    save(tmp_path / "good", tree())
    (tmp_path / "outside").write_bytes((tmp_path / "good/arrays/tree.norm/0").read_bytes())

    def link(chunk):
        chunk.unlink()
        chunk.symlink_to(tmp_path / "outside")

    for name, (harm, message) in {
        "changed": (lambda c: c.write_bytes(bytes([c.read_bytes()[0] ^ 1]) + c.read_bytes()[1:]), "SHA-256"),
        "cut": (lambda c: c.write_bytes(b""), "has 0 bytes"),
        "link": (link, "is a link"),
        "missing": (lambda c: c.unlink(), "is missing"),
        "more": (lambda c: (c.parent / "more").touch(), "more is not in the manifest"),
    }.items():
        root = tmp_path / name
        shutil.copytree(tmp_path / "good", root)
        harm(root / "arrays/tree.norm/0")
        with pytest.raises(InputError, match=message):
            load(root)
    for absent in (tmp_path / "absent", tmp_path / "outside", tmp_path):
        with pytest.raises(InputError, match=r"no such folder|is a file|has no tree\.json"):
            load(absent)


KILLED = """
import os, signal, sys
import numpy as np
from cluscomp_jax import save
from cluscomp_jax.checkpoint import {module}
real = {module}.{name}
def killed(*args):
    if {after}:
        real(*args)
    os.kill(os.getpid(), signal.SIGKILL)
{module}.{name} = killed
save(sys.argv[1], {{"w": np.ones(2)}})
"""


@pytest.mark.parametrize(
    ("module", "name", "after"),
    [("orbax_items", "write_item", False), ("orbax_items", "write_item", True), ("json_files", "dumps", True)],
)
def test_a_process_killed_while_it_saves_leaves_nothing_that_loads(tmp_path, module, name, after):
    program = KILLED.format(module=module, name=name, after=after)
    if module == "json_files":
        program = program.replace("cluscomp_jax.checkpoint import", "cluscomp_jax.runtime import")
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", program, out], env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    for left in tmp_path.iterdir():
        with pytest.raises(InputError, match=r"has no tree\.json"):
            load(left)
    save(out, {"w": np.zeros(2)})
    assert [path.name for path in Path(tmp_path).iterdir()] == ["out"]
