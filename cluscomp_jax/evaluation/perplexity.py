"""Perplexity of a model on a token stream, block by block. Sees a Model and a ParamSource, no files but scratch."""

import dataclasses
import hashlib
import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.clustering.matrix import decompress
from cluscomp_jax.config.numerics import Dtype
from cluscomp_jax.core.losses import token_nll
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.activations import ActivationStore, run_through
from cluscomp_jax.models.model import Model, build_model, check_length, check_tokens, run_block, run_embed, width
from cluscomp_jax.models.source import ParamSource, as_source
from cluscomp_jax.runtime.reporter import Reporter, SilentReporter
from cluscomp_jax.runtime.scratch import scratch_folder

HEAD_TOKENS = 512
"""Positions whose logits exist at one time."""


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on.

    Attributes:
      perplexity: exp(nll).
      nll: mean negative log-likelihood per scored token, nats.
      tokens: scored tokens, windows * (context - 1).
      windows: non-overlapping windows; a shorter last one is dropped.
      context: tokens per window.
      seconds: wall time.
      digest: SHA-256 of the windows as little-endian int32, in hex: which text it was.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    context: int
    seconds: float
    digest: str


def perplexity(
    params: Mapping[Any, Any] | ParamSource,
    tokens: np.ndarray,
    model_config: Any,
    *,
    context: int = 2048,
    batch_size: int = 1,
    dtype: Dtype = "float32",
    reporter: Reporter | None = None,
    work_dir: str | Path | None = None,
) -> Perplexity:
    """Returns the perplexity of non-overlapping windows, each scored on its context - 1 targets.

    All windows pass through one block before the next is loaded: parameters are read once, and memory holds one
    block and a few windows; the activations are in a memory-mapped temporary file.

    Args:
      params: a dict of dense or compressed params, or a ParamSource.
      tokens: int [t], the text tokenised once.
      model_config: the family's config, or a Model.
      context: tokens per window, >= 2.
      batch_size: windows per forward pass; changes the speed only.
      dtype: compute dtype; softmax, norms and losses are float32.
      reporter: receives progress; silent by default.
      work_dir: an existing folder for a temporary one with the activations (`scratch_bytes`); None:
        the system's folder for temporary files.

    Raises:
      InputError: fewer than `context` tokens, a token outside the vocabulary, no room for the activations, or an
        argument out of its range.
    """
    began = time.monotonic()
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be 1 or more")
    if dtype not in get_args(Dtype):
        raise InputError(f"dtype is {dtype!r}; it must be one of {', '.join(get_args(Dtype))}")
    model = build_model(model_config)
    source = as_source(params, model)
    windows = _windows(tokens, context, model)
    reporter = reporter or SilentReporter()
    with scratch_folder(work_dir, scratch_bytes(model, windows.shape, dtype)) as folder:
        reporter.start("evaluate", model.num_blocks * windows.size, "tokens")
        outer = jax.tree.map(jnp.asarray, source.load_outer())
        stream = _embedded(model, outer, windows, jnp.dtype(dtype), folder)
        for i in range(model.num_blocks):
            # Decoded once, not window by window; and one program serves all blocks, however finely each is cut.
            block = jax.tree.map(jnp.asarray, decompress(source.load_block(i)))
            step = partial(run_block, block, model=model, layer_type=model.layer_type(i))
            run_through(step, stream, stream, batch_size=batch_size, dtype=jnp.dtype(dtype))
            del block, step  # or two blocks would be on the device
            reporter.advance(windows.size)
        nll = _mean_nll(model, outer, stream, windows)
    scored = len(windows) * (context - 1)
    digest = hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest()
    return Perplexity(float(np.exp(nll)), nll, scored, len(windows), context, time.monotonic() - began, digest)


def scratch_bytes(model: Model, shape: tuple[int, ...], dtype: Dtype) -> int:
    """Returns the bytes of activations that `perplexity` has on the disk meanwhile.

    Args:
      model: the decoder.
      shape: (windows, context).
      dtype: compute dtype.
    """
    return math.prod(shape) * width(model) * np.dtype(jnp.dtype(dtype)).itemsize


def _windows(tokens: np.ndarray, context: int, model: Model) -> np.ndarray:
    """Returns the windows int32 [windows, context]."""
    tokens = np.asarray(tokens)
    if context < 2:
        raise InputError(f"context is {context}; it must be 2 or more")
    if tokens.ndim != 1:
        raise InputError(f"tokens have shape {tokens.shape}; they must be one stream [t]")
    if len(tokens) < context:
        raise InputError(
            f"the text has {len(tokens)} tokens, a window of {context} needs as many; "
            "use a longer text or a smaller context"
        )
    check_tokens(tokens, model, "the text")
    check_length(context, model, "context")
    return tokens[: len(tokens) // context * context].reshape(-1, context).astype(np.int32)


def _embedded(model: Model, outer: Params, windows: np.ndarray, dtype: Any, work_dir: Path) -> ActivationStore:
    stream = None
    for i, window in enumerate(windows):
        x = run_embed(outer, jnp.asarray(window[None]), model=model, dtype=dtype)
        if stream is None:
            stream = ActivationStore(work_dir / "stream.bin", (*windows.shape, x.shape[-1]), dtype)
        stream.write(slice(i, i + 1), x)
    assert stream is not None
    return stream


def _mean_nll(model: Model, outer: Params, stream: ActivationStore, windows: np.ndarray) -> float:
    """Returns the mean over all scored positions, summed in float64."""
    context = windows.shape[1]
    total = 0.0
    for where, x in stream.batches(1):
        for begin in range(0, context - 1, HEAD_TOKENS):
            span = slice(begin, min(begin + HEAD_TOKENS, context - 1))
            targets = windows[where, span.start + 1 : span.stop + 1]
            losses = head_losses(outer, jnp.asarray(x[:, span]), jnp.asarray(targets), model=model)
            total += float(np.sum(np.asarray(losses), dtype=np.float64))
    return float(total / (len(windows) * (context - 1)))


@partial(jax.jit, static_argnames="model")
def head_losses(outer: Params, x: jax.Array, targets: jax.Array, *, model: Model) -> jax.Array:
    """Returns -log p of the targets int32 [b, t] after the last block's outputs x [b, t, d], float32 [b, t]."""
    return token_nll(model.head(outer, x), targets)
