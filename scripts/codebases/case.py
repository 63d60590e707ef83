"""What a codebase hands to scripts/try_codebases.py: parameters, a forward pass, and the rules for its kernels."""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp

from cluscomp_jax import CompressionRule

VOCAB, WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 64, 128, 4, 2, 16, 2
BATCH, LENGTH = 2, 12


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny random model of a codebase.

    Attributes:
      params: the parameters, in the codebase's own pytree.
      inputs: the other arguments of `forward`.
      forward: (params, *inputs) -> logits; the codebase's own code, unmodified.
      rules: which kernels are clustered, and how their axes are to be read.
      context: what `forward` has to run under, such as a mesh.
      through_qwix: (provider, parameters) -> a forward pass of `inputs` through `qwix.quantize_model`; None where the
        codebase has no Flax modules.
    """

    params: Any
    inputs: tuple[Any, ...]
    forward: Callable[..., jax.Array]
    rules: tuple[CompressionRule, ...]
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    through_qwix: Callable[[Any, Any], Callable[..., jax.Array]] | None = None

    @property
    def lines(self) -> int:
        """Lines that a person types next to the forward pass: one a rule, the import, cluster_tree, with_codebooks."""
        return len(self.rules) + 3


@dataclasses.dataclass(frozen=True)
class Codebase:
    """A codebase by name.

    Attributes:
      name: on the command line and in the table.
      module: whose presence means that the codebase is installed.
      distribution: whose version is printed.
      install: what to type where it is missing.
      build: makes the tiny model.
    """

    name: str
    module: str
    distribution: str
    install: str
    build: Callable[[], Case]

    @property
    def installed(self) -> bool:
        """Whether Python finds the module."""
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:
            return False

    @property
    def version(self) -> str:
        """The installed version, "?" where there is no record of it."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return "?"


def rule(pattern: str, axes: str | None = None) -> CompressionRule:
    """Returns a rule for 16 codes of 4 weights: 1.25 bits per weight in a [64, 64] kernel."""
    return CompressionRule(pattern=pattern, group_size=4, num_codes=16, axes=axes)


def tokens() -> jax.Array:
    """Returns token numbers, int32 [BATCH, LENGTH], none of them 0, which some codebases take for padding."""
    return jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 1, VOCAB)


def _apply(model: Any, params: Any, *inputs: Any) -> jax.Array:
    return model.apply({"params": params}, *inputs)


def linen_case(
    model: Any,
    params: Any,
    inputs: tuple[Any, ...],
    rules: tuple[CompressionRule, ...],
    call: Callable[..., jax.Array] = _apply,
) -> Case:
    """Returns the case of a linen module; `call(model, params, *inputs)` returns the logits."""

    def through_qwix(provider: Any, params: Any) -> Callable[..., jax.Array]:
        import qwix

        return partial(call, qwix.quantize_model(model, provider), params)

    return Case(randomized(params), inputs, partial(call, model), rules, through_qwix=through_qwix)


def nnx_case(
    model: Any,
    rules: tuple[CompressionRule, ...],
    arguments: Callable[[jax.Array], tuple[Any, ...]] = lambda ids: (ids,),
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Case:
    """Returns the case of an nnx module called with `arguments(ids)`; it returns logits, or a tuple that begins so."""
    from flax import nnx

    graph, state = nnx.split(model)

    def call(model: Any, ids: jax.Array) -> jax.Array:
        out = model(*arguments(ids))
        return out[0] if isinstance(out, tuple) else out

    def through_qwix(provider: Any, state: Any) -> Callable[..., jax.Array]:
        import qwix

        return partial(call, qwix.quantize_model(nnx.merge(graph, state), provider, *arguments(tokens())))

    def forward(state: Any, ids: jax.Array) -> jax.Array:
        return call(nnx.merge(graph, state), ids)

    return Case(randomized(state), (tokens(),), forward, rules, context, through_qwix)


def randomized(params: Any) -> Any:
    """Returns the tree with every floating leaf of two or more axes drawn from a normal distribution.

    Kernels that a codebase initialises with zeros would hide a difference.
    """
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))

    def draw(leaf: Any, key: jax.Array) -> Any:
        if not hasattr(leaf, "ndim") or leaf.ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)

    return structure.unflatten([draw(leaf, key) for leaf, key in zip(leaves, keys, strict=True)])
