from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp_jax.core import trees
from cluscomp_jax.errors import InputError

KEYS = st.text("abc0_", min_size=1, max_size=3)
TREES = st.recursive(
    st.integers(), lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=4), max_leaves=12
).filter(lambda tree: isinstance(tree, dict))
modest = settings(deadline=None, max_examples=50)


def paths_of(tree: Any, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Oracle: {key tuple: leaf}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {path: leaf for key, value in tree.items() for path, leaf in paths_of(value, (*prefix, key)).items()}


@modest
@given(TREES)
def test_flatten_joins_the_keys_and_unflatten_undoes_it(tree: dict[str, Any]) -> None:
    flat = trees.flatten(tree)
    assert flat == {"/".join(path): leaf for path, leaf in paths_of(tree).items()}
    assert trees.unflatten(flat) == tree


@modest
@given(TREES)
def test_map_by_path_sees_every_path_once(tree: dict[str, Any]) -> None:
    assert trees.flatten(trees.map_by_path(lambda path, leaf: (path, leaf), tree)) == {
        path: (path, leaf) for path, leaf in trees.flatten(tree).items()
    }


NNX_LIKE = {"layers": {0: {"kernel": 1}, 1: {"kernel": 2}}, "norm": 3}


def test_integer_keys_read_as_their_digits() -> None:
    assert trees.flatten(NNX_LIKE) == {"layers/0/kernel": 1, "layers/1/kernel": 2, "norm": 3}
    assert trees.subtree(NNX_LIKE, "layers/1") == {"kernel": 2}


def test_subtree_and_without_share_out_a_tree() -> None:
    assert trees.without(NNX_LIKE, "layers") == {"norm": 3}
    assert trees.without(NNX_LIKE, "layers/0") == {"layers": {"1": {"kernel": 2}}, "norm": 3}
    assert trees.without({"layers": 1, "layers_b": 2}, "layers") == {"layers_b": 2}


def test_a_number_and_its_digits_cannot_both_be_keys() -> None:
    with pytest.raises(InputError, match="'a/1' appears twice"):
        trees.flatten({"a": {1: 0, "1": 0}})


@pytest.mark.parametrize("key", ["", "a/b"])
def test_a_key_that_is_no_path_part_is_named(key: str) -> None:
    with pytest.raises(InputError, match="non-empty and free of '/'"):
        trees.flatten({key: 0})


@pytest.mark.parametrize("flat", [{"a": 0, "a/b": 1}, {"a/b": 1, "a": 0}])
def test_a_path_cannot_be_leaf_and_folder(flat: dict[str, int]) -> None:
    with pytest.raises(InputError, match="leaf"):
        trees.unflatten(flat)


@pytest.mark.parametrize(("path", "message"), [("layers/2", "no 'layers/2'"), ("norm", "an array at 'norm'")])
def test_subtree_names_what_is_not_there(path: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        trees.subtree(NNX_LIKE, path)
