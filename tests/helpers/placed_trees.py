"""What `test_placement.py` runs on four virtual devices: {case: largest difference from one device, or the error}."""

import contextlib
import itertools
import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cluscomp_jax import CompressionRule, abstract, cluster_tree, decompress, load, save, with_codebooks

RNG = np.random.default_rng(0)
DENSE = {"q": RNG.normal(size=(16, 4, 8)).astype(np.float32), "up": RNG.normal(size=(3, 16, 16)).astype(np.float32)}
RULES = [
    CompressionRule(pattern="q", num_codes=16, axes="d n h -> | d | n h"),
    CompressionRule(pattern="up", num_codes=16, axes="l d f -> l | d | f"),
]
X = RNG.normal(size=(4, 16)).astype(np.float32)
SPECS = {
    "outputs": {"q": (None, "y"), "up": (None, None, "y")},
    "inputs": {"q": ("y",), "up": (None, "y")},
    "both": {"q": ("x", "y"), "up": (None, "x", "y")},
}


def programs(explicit):
    """The host's programs; on Explicit axes they say how their products are split."""

    def out(*axes):
        return {"out_sharding": PartitionSpec(*axes)} if explicit else {}

    def heads(t, x):
        return jnp.einsum("bd,dnh->bnh", x, t["q"], **out("x", "y"))

    def scan(t, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(jnp.matmul(h, w, **out("x", None))), None), x, t["up"])[0]

    def loop(t, x):
        for i in range(3):
            x = jnp.matmul(x, t["up"][i], **out("x", None))
        return x

    def decoded(t, x):
        return jnp.matmul(x, jnp.tanh(t["up"][1]), **out("x", None)) + jnp.sum(jnp.square(t["q"]))

    return {program.__name__: program for program in (heads, scan, loop, decoded)}


def value_and_gradients(function, tree, x):
    """Returns the result, its gradient in x, and those in the codebooks, in a jit."""

    def loss(x, codebooks, tree):
        y = function({k: w if k not in codebooks else with_codebook(w, codebooks[k]) for k, w in tree.items()}, x)
        return jnp.sum(jnp.sin(y)), y

    codebooks = {k: w.codebook.astype(jnp.float32) for k, w in tree.items()}
    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, codebooks, tree)


def with_codebook(w, codebook):
    return jax.tree.unflatten(jax.tree.structure(w), (codebook, w.index))


def difference(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)))) for a, b in pairs)


def main(out: Path) -> None:
    """Writes the differences."""
    tree = cluster_tree(DENSE, RULES)
    expected = {name: value_and_gradients(with_codebooks(p), tree, X) for name, p in programs(False).items()}
    folder = Path(tempfile.mkdtemp()) / "tree"
    save(folder, tree)
    results = {}
    for kind, (how, axes), inside in itertools.product(
        (AxisType.Auto, AxisType.Explicit), SPECS.items(), (True, False)
    ):
        mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
        where = {path: NamedSharding(mesh, PartitionSpec(*spec)) for path, spec in axes.items()}
        placed = load(folder, sharding=where)
        x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("x")))
        shapes = {k: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=where[k]) for k, w in DENSE.items()}
        same = [
            load(folder, sharding=where.__getitem__),
            load(folder, like=shapes),
            load(folder, like=abstract(shapes, RULES), sharding={"q": where["q"], "up": where["up"]}),
        ]
        cases = {
            "load": lambda same=same, placed=placed: alike(same, placed),
            "decompress": lambda placed=placed: difference(decompress(placed), decompress(tree)),
            "jitted decompress": lambda placed=placed: difference(jax.jit(decompress)(placed), decompress(tree)),
            "cluster": lambda where=where: difference(cluster_tree(jax.device_put(DENSE, where), RULES), tree),
        }
        if inside:
            for name, program in programs(kind == AxisType.Explicit).items():
                cases[name] = lambda name=name, program=program, placed=placed, x=x: difference(
                    value_and_gradients(with_codebooks(program), placed, x), expected[name]
                )
        with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
            for name, run in cases.items():
                key = f"{name}; {kind.name} axes, {how}, {'inside' if inside else 'outside'} set_mesh"
                try:
                    results[key] = run()
                except Exception as error:  # the test shows which it was
                    results[key] = f"{type(error).__name__}: {error}"
        results[f"splits; {kind.name} axes, {how}, {inside}"] = str(
            [tuple(leaf.sharding.spec) for k in ("q", "up") for leaf in (placed[k].codebook, placed[k].index)]
        )
    out.write_text(json.dumps(results))


def alike(trees, expected):
    for tree in trees:
        for leaf, other in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
            assert leaf.sharding == other.sharding, (leaf.sharding, other.sharding)
        assert difference(tree, expected) == 0
    return 0.0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
