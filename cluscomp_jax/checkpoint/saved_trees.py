"""save and load: any pytree with CodebookArrays as one folder that appears whole or not at all.

The folder holds tree.json (`tree_manifest`) and one orbax item. Knows no model; a model's checkpoint is read too.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluscomp_jax.checkpoint import inventory, orbax_items, tree_manifest
from cluscomp_jax.checkpoint.entries import Entry, check_owners, check_shared, decode, encode_any
from cluscomp_jax.checkpoint.manifest import MANIFEST_NAME, TREE_NAME, Contents
from cluscomp_jax.checkpoint.new_folder import new_folder, require_free
from cluscomp_jax.checkpoint.reader import load_checkpoint, open_checkpoint
from cluscomp_jax.checkpoint.tree_manifest import ITEM, expected_arrays, item_path
from cluscomp_jax.checkpoint.tree_template import NUMBERS, Template, cast, shardings
from cluscomp_jax.core import pytrees, trees
from cluscomp_jax.core.placement import place, shardings_by_path
from cluscomp_jax.errors import InputError
from cluscomp_jax.runtime import atomic, json_files


def save(path: str | Path, tree: Any) -> None:
    """Saves any pytree of arrays and CodebookArrays, whole or not at all.

    Args:
      path: absent, or an empty folder; nothing is overwritten.
      tree: params, an nnx.State or Module, dataclasses, linen boxes. Its leaves are CodebookArrays, whose indices are
        packed, arrays of bool, integers, floating and complex numbers, and Python's numbers.

    Raises:
      InputError: the path is taken or cannot be written to, or a leaf that cannot be stored, by its path.
      RunError: the disk is full or fails; nothing is kept.
    """
    root = Path(path)
    require_free(root)
    leaves = dict(pytrees.iterate(tree))
    entries: dict[str, Entry] = {}
    arrays: dict[str, Any] = {}
    for name, leaf in leaves.items():
        entries[name], encoded = encode_any(name, leaf)
        arrays |= {f"{item_path(name)}{key.removeprefix(name)}": array for key, array in encoded.items()}
    if not arrays:
        raise InputError("the tree has no array; there is nothing to save")
    check_owners(entries, root)
    check_shared(leaves, root)
    trees.unflatten(expected_arrays(entries))  # no path leads through another
    with new_folder(root) as aside:
        atomic.require_space(aside, orbax_items.disk_bytes(arrays))
        orbax_items.write_item(aside / ITEM, arrays)
        contents = Contents(entries, inventory.list_files(aside / ITEM, ITEM))
        fields = tree_manifest.to_dict(contents)
        tree_manifest.parse(fields, root)  # what could not be loaded is not saved
        inventory.check_expansion(root, {ITEM: contents})
        (aside / TREE_NAME).write_text(json_files.dumps(fields), encoding="utf-8")


def load(path: str | Path, *, like: Any = None, sharding: Any = None, dtype: Any = None) -> Any:
    """Returns the tree that `save` saved, or the parameters of a model's checkpoint, every file verified.

    Args:
      path: the folder.
      like: a pytree of the same paths: the tree itself, that before clustering, or either with ShapeDtypeStructs
        (`abstract`, `jax.eval_shape`). Its structure comes back. A leaf with a `sharding` says where, unless `sharding`
        is given. The dtype of a codebook is not compared. None: nested dicts by path.
      sharding: one jax.sharding.Sharding, a function path -> Sharding, or a pytree of them with the tree's paths. Of a
        kernel it is that of the host's array: its index is split in the same way where every device then has whole
        vectors, and is whole on every device otherwise; its codebook is split along stacked axes alone. None: arrays of
        the host (NumPy).
      dtype: float32, float16 or bfloat16, of dense floating arrays, of codebooks and of the arrays they decode to,
        whatever that of `like`. None: as saved.

    Raises:
      InputError: no saved tree, damage, a format of a newer version, or a leaf that `like`, `sharding` or `dtype` does
        not fit, by its path.
    """
    root = Path(path)
    entries, read = _open(root)
    wanted = None if like is None else dict(pytrees.iterate(like))
    template = Template(root, entries, dtype)
    if wanted is not None:
        template.check(wanted)
    if sharding is None and wanted is not None:
        sharding = shardings(wanted).get
    where = shardings_by_path(entries, sharding)
    leaves = {}
    for name, leaf in read().items():
        leaves[name] = place(name, cast(name, leaf, template.dtype), where[name])
    if like is not None:
        return pytrees.map_by_path(lambda name, leaf: _like(leaf, leaves[name]), like)
    return leaves[""] if leaves.keys() == {""} else trees.unflatten(leaves)


def describe_tree(path: str | Path) -> dict[str, Any] | None:
    """Returns the tree.json of a saved tree, checked as `load` does; None where there is none.

    Raises:
      InputError: as `load`.
    """
    root = Path(path)
    if not (root / TREE_NAME).exists():
        return None
    tree_manifest.open_tree(root)
    return json_files.read_object(root / TREE_NAME)


def verify_tree(path: str | Path) -> None:
    """Returns if every file of a saved tree has the SHA-256 of its tree.json.

    Raises:
      InputError: one has not, or as `load`.
    """
    inventory.verify(Path(path), tree_manifest.open_tree(Path(path)))


def _open(root: Path) -> tuple[Mapping[str, Entry], Callable[[], dict[str, Any]]]:
    """Returns (the entries, a function that reads the leaves) of a saved tree or of a model's checkpoint."""
    if not root.is_dir():
        found = "is a file, not a folder" if root.exists() else "no such folder"
        raise InputError(f"{root}: {found}; give a folder that cluscomp_jax.save wrote")
    if not (root / TREE_NAME).exists():
        if not (root / MANIFEST_NAME).exists():
            raise InputError(f"{root}: has no {TREE_NAME}; give a folder that cluscomp_jax.save wrote")
        entries = open_checkpoint(root).manifest.contents.entries
        return entries, lambda: trees.flatten(load_checkpoint(root).params)
    contents = tree_manifest.open_tree(root)
    return contents.entries, lambda: _read(root, contents)


def _read(root: Path, contents: Contents) -> dict[str, Any]:
    inventory.verify(root, contents)
    entries = contents.entries
    arrays, owners = orbax_items.read_item(root / ITEM, expected_arrays(entries)), tree_manifest.owners(entries)
    try:
        return {
            path: decode(item_path(path), entry, arrays, item_path(owners.get(path, path)))
            for path, entry in entries.items()
        }
    except InputError as error:
        raise InputError(f"{root}: {error}; the folder is damaged") from error


def _like(leaf: Any, loaded: Any) -> Any:
    return type(leaf)(loaded[()]) if isinstance(leaf, NUMBERS) else loaded
