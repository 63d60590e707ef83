"""Holds our forward pass of a host's parameters against the host's own, on a few tokens.

It finds what names and shapes do not show: square kernels that are transposed, another rope, a missing scale.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.core import pytrees
from cluscomp_jax.core.caller_mesh import without_mesh
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.layouts.host_tree import is_floating
from cluscomp_jax.models.layouts.recognise import OpenedTree
from cluscomp_jax.models.model import Model, run_block, run_embed

ApplyFn = Callable[[Any, jax.Array], Any]
"""apply_fn(params, tokens int32 [b, t]) -> logits [b, t, v]: the host's forward pass."""
_SHAPE = (2, 16)
_LEAST, _EPSILONS = 1e-4, 16
"""A difference may be this share of the largest logit, or that many epsilons of the coarsest dtype."""


def check_forward(params: Any, opened: OpenedTree, apply_fn: ApplyFn) -> None:
    """Compares both forward passes on 32 tokens, drawn with a fixed seed.

    Products are of the highest precision that the device has. The arrays stay where they are for the host's pass; ours
    takes one block at a time.

    Args:
      params: as the caller gave them.
      opened: the same, opened.
      apply_fn: the host's forward pass.

    Raises:
      InputError: the logits differ by more than the dtype allows, or have another shape.
    """
    model = opened.model
    length = min(_SHAPE[1], getattr(model.config, "max_position_embeddings", _SHAPE[1]))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (_SHAPE[0], length)).astype(np.int32)
    with jax.default_matmul_precision("highest"):
        found = apply_fn(params, jnp.asarray(tokens))
        shape = getattr(found, "shape", None)
        wanted = (*tokens.shape, model.config.vocab_size)
        if shape is None or tuple(shape) != wanted:
            given = f"an array of shape {tuple(shape)}" if shape is not None else f"a {type(found).__name__}"
            raise InputError(f"check returned {given}; it must return the logits, {wanted}")
        theirs = np.asarray(found).astype(np.float64)
        with without_mesh():
            ours = np.asarray(_logits(opened, jnp.asarray(tokens))).astype(np.float64)
    dtypes = {leaf.dtype for _, leaf in pytrees.iterate(params) if is_floating(leaf)} | {found.dtype}
    epsilon = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)  # type: ignore[no-untyped-call]
    largest, difference = np.abs(theirs).max(), np.abs(ours - theirs).max()
    allowed = max(_LEAST, _EPSILONS * epsilon) * largest
    if not difference <= allowed:
        raise InputError(
            f"check: logits differ by up to {difference:.3g}, the largest is {largest:.3g}, {allowed:.2g} is allowed; "
            f"the parameters were read in the layout of {opened.name}: are kernels transposed, or are rope, scale, "
            "activation or epsilon of the model config not those of the host?"
        )


def _logits(opened: OpenedTree, tokens: jax.Array) -> jax.Array:
    """Returns our logits, computed in float32."""
    model, outer = opened.model, opened.source.load_outer()
    x = run_embed(outer, tokens, model=model, dtype=jnp.dtype(jnp.float32))
    for i in range(model.num_blocks):
        x = run_block(opened.source.load_block(i), x, model=model, layer_type=model.layer_type(i))
    return _head(outer, x, model=model)


@partial(jax.jit, static_argnames="model")
def _head(outer: Params, x: jax.Array, *, model: Model) -> jax.Array:
    return model.head(outer, x)
