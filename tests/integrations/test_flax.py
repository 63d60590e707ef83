"""Clustered variables in linen and nnx modules of other people, unmodified."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from cluscomp_jax import CodebookArray, CompressionRule, InputError, cluster_tree, count_products, decompress
from cluscomp_jax.integrations import linen
from cluscomp_jax.integrations.nnx import Codebook, Index, convert

X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 16)), jnp.float32)


class Shifted(nn.Dense):
    """A subclass that adds something of its own."""

    def __call__(self, inputs):
        return super().__call__(inputs) + 100.0


def halved(lhs, rhs, dimension_numbers, **options):
    return 0.5 * jax.lax.dot_general(lhs, rhs, dimension_numbers, **options)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(16)(x)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
        return layers()(x, None)[0]


MODULES = {
    "a subclass of Dense": (Shifted(12), "params/kernel", None, 1),
    "a dot_general of its own": (nn.Dense(12, dot_general=halved), "params/kernel", None, 1),
    "DenseGeneral": (nn.DenseGeneral((2, 6)), "params/kernel", "d n h -> | d | n h", 1),
    "Einsum": (nn.Einsum((16, 2, 6), "btd,dnh->bnth"), "params/kernel", "d n h -> | d | n h", 1),
    "scan over axis 1": (Scanned(), "params/.*Dense_0/kernel", "i l o -> l | i | o", 1),
    "a convolution": (nn.Conv(12, (3,)), "params/kernel", "w i o -> | w i | o", 0),
    "attention": (nn.MultiHeadDotProductAttention(2), "params/(query|key|value)/kernel", "d n h -> | d | n h", 3),
}


@pytest.mark.parametrize("name", MODULES)
def test_linen_modules_run_unmodified(name):
    module, pattern, axes, served = MODULES[name]
    variables = module.init(jax.random.key(0), X)
    clustered = cluster_tree(variables, [CompressionRule(pattern=pattern, num_codes=24, axes=axes)])
    with count_products() as count:
        got = linen.apply(module, clustered, X)
    np.testing.assert_allclose(got, module.apply(decompress(clustered), X), rtol=1e-5, atol=1e-5)
    assert count.served == served
    assert count.decoded == (served == 0)


def test_a_module_of_another_size_is_refused_by_linen_itself():
    variables = cluster_tree(
        nn.Dense(12).init(jax.random.key(0), X), [CompressionRule(pattern=".*kernel", num_codes=8)]
    )
    with pytest.raises(Exception, match="shape"):
        linen.apply(nn.Dense(13), variables, X)


def test_linen_keeps_its_arguments():
    module = nn.Sequential([nn.Dense(16), nn.BatchNorm(use_running_average=False)])
    variables = module.init(jax.random.key(0), X)
    clustered = cluster_tree(variables, [CompressionRule(pattern=".*Dense.*|.*layers_0/kernel", num_codes=24)])
    got, changed = linen.apply(module, clustered, X, mutable=["batch_stats"])
    want, expected = module.apply(decompress(clustered), X, mutable=["batch_stats"])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert jax.tree.structure(changed) == jax.tree.structure(expected)


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up, self.down = nnx.Linear(16, 24, rngs=rngs), nnx.Linear(24, 16, rngs=rngs)
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x, *, scale=1.0):
        self.calls[...] = self.calls[...] + 1
        return scale * self.down(nnx.gelu(self.up(x)))


RULE = CompressionRule(pattern=".*/kernel", num_codes=24)


def test_an_nnx_module_is_converted_called_and_trained():
    host = cluster_tree(Net(), [RULE])
    model = convert(host)
    np.testing.assert_allclose(model(X, scale=2.0), decompress(host)(X, scale=2.0), rtol=1e-5, atol=1e-5)
    assert int(model.host.calls[...]) == 1
    assert len(jax.tree.leaves(nnx.state(model, Codebook))) == 2
    assert len(jax.tree.leaves(nnx.state(model, Index))) == 2

    def loss(model):
        return jnp.mean(jnp.square(model(X) - 0.5 * X))

    index = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, Index))]
    with jax.numpy_dtype_promotion("standard"):  # optax asks for it
        optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=Codebook)

        @nnx.jit
        def step(model, optimizer):
            value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, Codebook))(model)
            optimizer.update(model, gradients)
            return value

        losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    for one, other in zip(index, jax.tree.leaves(nnx.state(model, Index)), strict=True):
        np.testing.assert_array_equal(one, other)
    trained = model.module()
    assert isinstance(trained, Net)
    assert isinstance(trained.up.kernel[...], CodebookArray)
    assert trained.up.kernel[...].codebook.dtype == np.float16


def test_a_dense_module_is_refused():
    with pytest.raises(InputError, match="cluster it first"):
        convert(Net())


class Noisy(nnx.Module):
    def __init__(self, sows=False):
        rngs = nnx.Rngs(0)
        self.up, self.down = nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)
        self.drop, self.norm = nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(16, rngs=rngs)
        self.sows = sows

    def __call__(self, x):
        y = self.norm(self.down(self.drop(self.up(x))))
        if self.sows:
            self.seen = nnx.Intermediate(y)
        return y


def test_eval_and_train_reach_the_host():
    model = convert(cluster_tree(Noisy(), [RULE]))
    first, second = model(X), model(X)
    assert not np.array_equal(first, second)
    model.eval()
    mean = np.asarray(model.host.norm.mean[...])
    np.testing.assert_array_equal(model(X), model(X))
    np.testing.assert_array_equal(model.host.norm.mean[...], mean)
    model.train()
    model(X)
    assert not np.array_equal(model.host.norm.mean[...], mean)


def test_shared_codebooks_stay_shared():
    host = cluster_tree(Noisy(), [RULE])
    owner = host.up.kernel[...]
    host.down.kernel = nnx.Param(dataclasses.replace(owner, tied_to="up/kernel"))
    model = convert(host)
    assert len(jax.tree.leaves(nnx.state(model, Codebook))) == 1
    model.kernels[0].codebook[...] = model.kernels[0].codebook[...] + 1
    back = model.module()
    np.testing.assert_array_equal(back.up.kernel[...].codebook, back.down.kernel[...].codebook)


def test_a_call_that_adds_variables_is_refused():
    model = convert(cluster_tree(Noisy(sows=True), [RULE]))
    with pytest.raises(InputError, match="adds 'seen' to the module"):
        model(X)
