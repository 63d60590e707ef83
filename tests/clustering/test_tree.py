"""cluster_tree on pytrees of every kind: what is clustered, in which axes, and what is refused."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_trees import Layer, Net, linen_variables

from cluscomp_jax import CodebookArray, CompressionRule, InputError, cluster_tree, decompress, size_report
from cluscomp_jax.clustering.matrix import cluster_matrix, matrix_key
from cluscomp_jax.config.clustering import ClusterConfig


def normal(*shape, dtype=np.float32):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


def rule(pattern, **settings):
    return CompressionRule(pattern=pattern, **{"num_codes": 16, **settings})


TREES = {
    "lists in dicts": ({"a": [normal(8, 12)], "b": 3}, "a/0"),
    "integer keys": ({0: {"w": normal(8, 12)}}, "0/w"),
    "a dataclass": (Layer(jnp.asarray(normal(8, 12)), jnp.ones(12), "x"), "w"),
    "an nnx module": (Net(), "layers/1/kernel"),
    "an nnx state": (nnx.state(Net()), "layers/0/kernel"),
    "a linen box": (linen_variables(), "params/kernel"),
}


@pytest.mark.parametrize("name", TREES)
def test_the_tree_keeps_its_structure(name):
    tree, path = TREES[name]
    got = cluster_tree(tree, [rule(path)])
    assert type(got) is type(tree)
    assert [size.path for size in size_report(got).matrices] == [path]
    restored = decompress(got)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
        assert np.shape(one) == np.shape(other)
    changed = [
        not np.array_equal(one, other)
        for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True)
    ]
    assert sum(changed) == 1


AXES = {
    "d n h -> | d | n h": ((8, 3, 4), lambda w: w.reshape(8, 12)),
    "n d h -> | d | n h": ((3, 8, 4), lambda w: w.transpose(1, 0, 2).reshape(8, 12)),
    "n h d -> | n h | d": ((3, 4, 8), lambda w: w.reshape(12, 8)),
    "o i -> | i | o": ((12, 8), lambda w: w.T),
}


@pytest.mark.parametrize("axes", AXES)
def test_axes_name_the_matrix(axes):
    shape, to_matrix = AXES[axes]
    w = normal(*shape)
    got = cluster_tree({"w": w}, [rule("w", axes=axes)])["w"]
    matrix = to_matrix(w)
    want, _ = cluster_matrix(matrix, rule("w"), ClusterConfig(), key=matrix_key(42, "w"))
    assert got.shape == shape
    assert got.matrix_shape == matrix.shape
    np.testing.assert_array_equal(got.index, want.index)
    np.testing.assert_array_equal(to_matrix(np.asarray(got)), np.asarray(want, np.float32))


@pytest.mark.parametrize("at", [0, 1, 2])
def test_stacked_matrices_have_codebooks_of_their_own(at):
    w = np.moveaxis(normal(3, 8, 12), 0, at)
    axes = [*"io"]
    axes.insert(at, "l")
    got = cluster_tree({"w": w}, [rule("w", axes=f"{' '.join(axes)} -> l | i | o")])["w"]
    assert got.shape == w.shape
    assert got.codebook.shape == tuple(np.insert((16, 4), at, 3))
    for i in range(3):
        one, _ = cluster_matrix(np.take(w, i, at), rule("w"), ClusterConfig(), key=matrix_key(42, f"w[{i}]"))
        np.testing.assert_array_equal(np.take(np.asarray(got), i, at), np.asarray(one, np.float32))
    (size,) = size_report({"w": got}).matrices
    assert size.bits == 3 * (4 * 8 * 3 + 16 * 16 * 4)


def test_a_stack_is_indexed_sliced_scanned_and_mapped():
    got = cluster_tree({"w": normal(3, 8, 12)}, [rule("w", axes="l i o -> l | i | o")])["w"]
    dense = np.asarray(got)
    assert isinstance(got[1], CodebookArray)
    np.testing.assert_array_equal(np.asarray(got[1]), dense[1])
    np.testing.assert_array_equal(np.asarray(got[1:]), dense[1:])
    np.testing.assert_array_equal(got[1, :, 2], dense[1, :, 2])
    assert [one.shape for one in got] == [(8, 12)] * 3
    with pytest.raises(IndexError):
        got[3]
    _, scanned = jax.lax.scan(lambda carry, w: (carry, w.astype(jnp.float32).sum()), None, got)
    mapped = jax.vmap(lambda w: jnp.asarray(w).sum())(got)
    np.testing.assert_allclose(scanned, dense.sum((1, 2)), rtol=1e-4)
    np.testing.assert_allclose(mapped, dense.sum((1, 2)), rtol=1e-4)


def test_it_takes_the_place_of_an_array():
    got = cluster_tree({"w": normal(8, 12)}, [rule("w")])["w"]
    dense = np.asarray(got)
    assert (got.ndim, got.size, got.dtype, len(got)) == (2, 96, np.float32, 8)
    assert got.nbytes == got.codebook.nbytes + got.index.nbytes
    np.testing.assert_array_equal(jnp.asarray(got) + 1, dense + 1)
    np.testing.assert_array_equal(got.T, dense.T)
    assert got == got
    assert got != cluster_tree({"w": normal(8, 12)}, [rule("w")])["w"]
    assert len({got, got}) == 1
    assert repr(got) == "CodebookArray(float32[8, 12], 16 codes of 4, axis='out')"


def test_the_dtype_of_the_host_is_kept():
    got = cluster_tree({"w": normal(8, 12, dtype=jnp.bfloat16)}, [rule("w")])
    assert got["w"].dtype == jnp.bfloat16
    assert decompress(got)["w"].dtype == jnp.bfloat16
    assert got["w"].codebook.dtype == np.float16


def test_hessians_lower_the_error_they_weigh():
    random = np.random.default_rng(0)
    x = random.standard_normal((200, 8)) @ random.standard_normal((8, 8)) * np.array([9, 3, 1, 1, 1, 1, 1, 0.3])
    hessian, w = (x.T @ x / len(x)).astype(np.float32), normal(8, 48)

    def loss(hessians):
        error = np.asarray(cluster_tree({"w": w}, [rule("w")], hessians=hessians)["w"]) - w
        return np.trace(error.T @ hessian @ error)

    assert loss({"w": hessian}) < 0.6 * loss(None)


def test_arrays_on_a_device_stay_there_and_others_on_the_host():
    got = cluster_tree({"a": jnp.asarray(normal(8, 12)), "b": normal(8, 12)}, [rule("[ab]")])
    assert isinstance(got["a"].index, jax.Array)
    assert isinstance(got["b"].index, np.ndarray)


W = normal(8, 12)
REFUSED = {
    "one rule": ({"w": W}, rule("w"), "one CompressionRule; give a list"),
    "no rules": ({"w": W}, [], "non-empty list"),
    "a string": ({"w": W}, ["w"], "list of CompressionRule"),
    "nothing matched": ({"w": W}, [rule("v")], "rule 'v' decides over no leaf of the tree"),
    "covered by an earlier rule": ({"w": W}, [rule(".*"), rule("w")], "rule 'w' decides over no leaf"),
    "three axes": ({"w": normal(2, 3, 4)}, [rule("w")], "axes='m d f -> m | d | f'"),
    "axes of another rank": ({"w": W}, [rule("w", axes="a b c -> | a | b c")], "names 3"),
    "parted stacks": ({"w": normal(2, 3, 4, 5)}, [rule("w", axes="a b c d -> a c | b | d")], "must be neighbours"),
    "a late stack": ({"w": normal(2, 3, 4, 5)}, [rule("w", axes="a b c d -> d | a | b c")], "can begin at 0, 1 or 2"),
    "integers": ({"w": W.astype(np.int8)}, [rule("w")], "multiply quantised ones by their scale"),
    "shapes": ({"w": jax.ShapeDtypeStruct((8, 12), jnp.float32)}, [rule("w")], "load the parameters first"),
    "no array": ({"w": "text"}, [rule("w")], "is a str, no array"),
    "NaN": ({"w": np.full((8, 12), np.nan, np.float32)}, [rule("w")], "holds NaN or Inf"),
    "empty": ({"w": np.zeros((0, 12), np.float32)}, [rule("w")], "is empty"),
    "clustered": (cluster_tree({"w": W}, [rule("w")]), [rule("w")], "clustered already"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.nans
def test_refused_in_one_line(name):
    tree, rules, message = REFUSED[name]
    with pytest.raises(InputError) as error:
        cluster_tree(tree, rules)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("hessians", "message"),
    [
        ({"v": np.eye(8)}, "'v' is no leaf that a rule matches"),
        ({"w": np.eye(12)}, "that of w has shape (12, 12); its inputs make (8, 8)"),
        ({"w": np.full((8, 8), np.inf)}, "holds NaN or Inf"),
        ({"w": np.full((8, 8), "a")}, "that of w is <U1; it must be floating"),
        ({"w": np.eye(8, dtype=int)}, "that of w is int64; it must be floating"),
        ({"w": -np.eye(8)}, "that of w has -1.0 on its diagonal"),
    ],
)
def test_hessians_that_do_not_fit(hessians, message, monkeypatch):
    monkeypatch.setattr("cluscomp_jax.clustering.tree.cluster_matrix", None)  # refused before any leaf is clustered
    with pytest.raises(InputError) as error:
        cluster_tree({"first": W, "w": W}, [rule(".*")], hessians=hessians)
    assert message in str(error.value)


@pytest.mark.parametrize("axes", ["d n h", "a b -> a | b", "a a b -> | a | b", "a b -> | a b |", "a b -> | a | c"])
def test_axes_that_cannot_be_read(axes):
    with pytest.raises(InputError, match="axes"):
        rule("w", axes=axes)


@partial(jax.tree_util.register_dataclass, data_fields=["query", "value"], meta_fields=[])
@dataclasses.dataclass
class Attention:
    query: jax.Array
    value: jax.Array


def test_a_field_called_value_is_not_a_box():
    got = cluster_tree({"a": Attention(normal(8, 12), normal(8, 12))}, [rule("a/(query|value)")])
    assert isinstance(got["a"].query, CodebookArray)
    assert isinstance(got["a"].value, CodebookArray)


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(InputError, match="two leaves of the tree have the path 'a/b'"):
        cluster_tree({"a/b": normal(8, 12), "a": {"b": normal(8, 12)}}, [rule("a/b")])


def test_a_pattern_that_is_no_expression_is_refused():
    with pytest.raises(InputError, match="is not a regular expression"):
        rule("w(")
