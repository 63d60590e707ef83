"""ClusterProvider: unmodified linen and nnx modules run on clustered parameters, and equal those on decoded ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cluscomp_jax import CompressionRule, cluster_tree, count_products, decompress
from codebases.own_llamas import LinenLlama, NnxLlama

qwix = pytest.importorskip("qwix")
from cluscomp_jax.integrations.qwix import ClusterProvider  # noqa: E402

IDS = jax.random.randint(jax.random.key(1), (2, 6), 0, 64)


def rule(pattern: str, axes: str | None = None) -> CompressionRule:
    return CompressionRule(pattern=pattern, num_codes=16, axes=axes)


def differ(a: jax.Array, b: jax.Array) -> float:
    return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))


def test_linen_llama_runs_unmodified() -> None:
    model = LinenLlama()
    params = model.init(jax.random.key(0), IDS)["params"]
    clustered = cluster_tree(params, [rule(r"layers_\d+/.*_proj/kernel"), rule("lm_head/kernel")])
    served = qwix.quantize_model(model, ClusterProvider())
    with count_products() as counts:
        logits = jax.jit(served.apply)({"params": clustered}, IDS)
    assert (counts.served, counts.decoded) == (15, 0)
    assert differ(logits, model.apply({"params": decompress(clustered)}, IDS)) < 1e-5


# qwix 0.1.8 asks a model for its modules in a way that Flax 0.12.12 is about to drop.
@pytest.mark.filterwarnings("ignore:The 'm.iter_modules:DeprecationWarning")
def test_nnx_llama_runs_unmodified() -> None:
    graph, state = nnx.split(NnxLlama(nnx.Rngs(0)))
    clustered = cluster_tree(state, [rule(r"layers/\d+/.*_proj/kernel")])
    served = qwix.quantize_model(nnx.merge(graph, clustered), ClusterProvider(), IDS)
    with count_products() as counts:
        logits = served(IDS)
    assert (counts.served, counts.decoded) == (14, 0)
    assert differ(logits, nnx.merge(graph, decompress(clustered))(IDS)) < 1e-5


class Mixed(nn.Module):
    """Boxed kernels, einsum, dot, a kernel in bfloat16, and one that is sliced before its product."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None, None))
        q = self.param("q", boxed, (4, 32, 8))
        x = jnp.einsum("btd,ndh->btnh", x, q).reshape(*x.shape[:2], 32)
        x = jnp.dot(x, self.param("dot", nn.initializers.lecun_normal(), (32, 32)))
        x = nn.DenseGeneral((4, 8), dtype=jnp.bfloat16, name="general")(x).astype(jnp.float32).reshape(x.shape)
        halves = self.param("halves", nn.initializers.lecun_normal(), (2, 32, 32))
        return x @ halves[0] + x @ halves[1]


def test_boxes_other_products_and_slices() -> None:
    model, x = Mixed(), jax.random.normal(jax.random.key(2), (2, 3, 32))
    variables = model.init(jax.random.key(0), x)
    rules = [
        rule("params/q", "n d h -> | d | n h"),
        rule("params/dot"),
        rule("params/general/kernel", "d n h -> | d | n h"),
        rule("params/halves", "s i o -> s | i | o"),
    ]
    clustered = cluster_tree(variables, rules)
    with count_products() as counts:
        found = qwix.quantize_model(model, ClusterProvider()).apply(clustered, x)
    assert counts.served >= 3
    assert differ(found, model.apply(decompress(clustered), x)) < 1e-2  # bfloat16 in between


class Scanned(nn.Module):
    """Dense layers stacked by linen's scan."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layer(name="layers")(x, None)[0]


class Step(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + nn.Dense(32, name="dense")(x), None


def test_scanned_layers() -> None:
    model, x = Scanned(), jax.random.normal(jax.random.key(2), (2, 3, 32))
    params = model.init(jax.random.key(0), x)["params"]
    clustered = cluster_tree(params, [rule("layers/dense/kernel", "l i o -> l | i | o")])
    with count_products() as counts:
        found = qwix.quantize_model(model, ClusterProvider()).apply({"params": clustered}, x)
    assert counts.served >= 1
    assert counts.decoded == 0
    assert differ(found, model.apply({"params": decompress(clustered)}, x)) < 1e-5


def test_a_model_that_is_not_clustered_runs_as_before() -> None:
    model = LinenLlama()
    params = model.init(jax.random.key(0), IDS)
    found = qwix.quantize_model(model, ClusterProvider()).apply(params, IDS)
    np.testing.assert_array_equal(found, model.apply(params, IDS))
