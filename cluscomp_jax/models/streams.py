"""The activation streams of a compression: what the original model computes, and what the compressed model does.

Knows stores and batches, not how a block is compressed: a block comes as a function of its input.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.core.losses import BlockErrorSettings, block_error, token_weights
from cluscomp_jax.core.trees import Params
from cluscomp_jax.models.activations import ActivationStore, run_through
from cluscomp_jax.models.calibration import Embeddings
from cluscomp_jax.models.model import Model, run_embed
from cluscomp_jax.models.sharding import Sharding, put_samples

weigh_tokens = jax.jit(token_weights, static_argnames="limit")
_block_error = jax.jit(block_error, static_argnames="settings")
Step = Callable[[jax.Array], jax.Array]
"""A block: x [b, t, d] -> y [b, t, d]."""


class Batch(NamedTuple):
    """Inputs of a block at some positions.

    Attributes:
      x: [b, t, d] of the compressed stream.
      original: [b, t, d] of the original stream, or None.
      weights: float32 [b, t], the weight of each position, or None for 1.
    """

    x: jax.Array
    original: jax.Array | None = None
    weights: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Streams:
    """The inputs of a block, and how they are read.

    Attributes:
      compressed: what the compressed model computes.
      original: what the original model computes, or None where nothing needs it.
      upcoming: where `token_weights` keeps the original block's outputs, so that they are computed once; None where
        nothing looks at them before the original stream is moved.
      batch_size: samples at a time.
      dtype: compute dtype.
      sharding: of the samples of a batch, where several devices share them.
      validation_samples: how many of the last samples no statistics are made of, because tuning is judged by them.
      weights: float32 [samples, t], 0 at padding and one number elsewhere, 1 on average; None: there is no padding.
    """

    compressed: ActivationStore
    original: ActivationStore | None
    upcoming: ActivationStore | None
    batch_size: int
    dtype: Any
    sharding: Sharding | None = None
    validation_samples: int = 0
    weights: np.ndarray | None = None

    def batches(self, weights: np.ndarray | None, *, both: bool = False) -> Iterator[Batch]:
        """Yields inputs of the compressed stream, less the samples held out.

        Args:
          weights: float32 [samples, t], the weight of each position; None: 1.
          both: of the original stream too.
        """
        for where, x in self.compressed.batches(self.batch_size, len(self.compressed) - self.validation_samples):
            original = self._on_device(self.original.read(where)) if both and self.original is not None else None
            counted = self._weights(where, weights)
            yield Batch(self._on_device(x), original, counted)

    def token_weights(self, block: Step, limit: float) -> np.ndarray:
        """Returns float32 [samples, t], the weight of each position by its output of the original block.

        Args:
          block: the original one; `upcoming`, where there is such a store, keeps its outputs for `pass_original`.
          limit: as of `cluscomp_jax.core.losses.token_weights`, > 0.
        """
        stream, found = self.compressed if self.original is None else self.original, []
        for where, x in stream.batches(self.batch_size):
            y = block(self._on_device(x))
            found.append(np.asarray(weigh_tokens(y, limit=limit, valid=self._weights(where))))
            if self.upcoming is not None:
                self.upcoming.write(where, y)
        return np.concatenate(found)

    def pass_original(self, block: Step | None) -> None:
        """Moves the original stream, if there is one, to the outputs of the original block.

        Args:
          block: the original one; None: its outputs are in `upcoming`, where `token_weights` kept them.
        """
        if self.original is None:
            return
        if block is not None:
            self._pass(block, self.original, self.original)
            return
        assert self.upcoming is not None
        self.original.exchange(self.upcoming)

    def pass_compressed(self, block: Step) -> None:
        """Moves the compressed stream to the outputs of the compressed block."""
        self._pass(block, self.compressed, self.compressed)

    def write(self, i: int, x: Any) -> None:
        """Stores sample i [1, t, d] of the first block's input in both streams."""
        for store in (self.compressed, self.original):
            if store is not None:
                store.write(slice(i, i + 1), np.asarray(x))

    def error(self, settings: BlockErrorSettings) -> float | None:
        """Returns the mean error of the compressed stream against the original one, as tuning counts it."""
        if self.original is None:
            return None
        error = partial(_block_error, settings=settings)
        total = sum(
            len(x) * float(error(jnp.asarray(x), jnp.asarray(self.original.read(where)), weights=self._alone(where)))
            for where, x in self.compressed.batches(self.batch_size)
        )
        return total / len(self.compressed)

    def delete(self) -> None:
        """Removes the files."""
        for store in (self.original, self.compressed, self.upcoming):
            if store is not None:
                store.delete()

    def _pass(self, block: Step, stream: ActivationStore, into: ActivationStore) -> None:
        put = partial(put_samples, sharding=self.sharding)
        run_through(block, stream, into, batch_size=self.batch_size, dtype=self.dtype, put=put)

    def _weights(self, where: slice, weights: np.ndarray | None = None) -> jax.Array | None:
        """Returns float32 [b, t], the weight of each position of a batch, times `weights`; None: 1."""
        own = None if self.weights is None else self.weights[where]
        if weights is not None:
            own = weights[where] if own is None else own * weights[where]
        return None if own is None else put_samples(own, self.sharding)

    def _alone(self, where: slice) -> jax.Array | None:
        return None if self.weights is None else jnp.asarray(self.weights[where])

    def _on_device(self, x: np.ndarray) -> jax.Array:
        return put_samples(x, self.sharding).astype(self.dtype)


def embed_streams(
    model: Model,
    outer: Params,
    tokens: np.ndarray,
    work_dir: Path,
    activation_dtype: Any,
    *,
    dtype: Any,
    **options: Any,
) -> Streams:
    """Returns the streams at the first block's input, in files of `work_dir`.

    Args:
      outer: parameters outside the blocks.
      tokens: int [samples, t].
      activation_dtype: of the files.
      dtype: as of `Streams`.
      **options: `original` and `upcoming`, whether there are such stores; batch_size, sharding and
        validation_samples as of `Streams`.

    Raises:
      OSError: the disk has no room for them.
    """
    embed = partial(run_embed, jax.tree.map(jnp.asarray, outer), model=model, dtype=dtype)
    width = embed(jnp.asarray(tokens[:1])).shape[-1]
    streams = open_streams((*tokens.shape, width), work_dir, activation_dtype, dtype=dtype, **options)
    for i in range(len(tokens)):
        streams.write(i, embed(jnp.asarray(tokens[i : i + 1])))
    return streams


def write_streams(
    embeddings: Embeddings, work_dir: Path, activation_dtype: Any, *, dtype: Any, **options: Any
) -> Streams:
    """Returns the streams at the first block's input, which is given in place of tokens.

    Args:
      embeddings: packed.
      work_dir, activation_dtype, dtype, **options: as of `embed_streams`.

    Raises:
      OSError: the disk has no room for them.
    """
    shape = (*embeddings.shape, embeddings.inputs.shape[2])
    streams = open_streams(shape, work_dir, activation_dtype, dtype=dtype, weights=embeddings.weights, **options)
    for i in range(len(embeddings.inputs)):
        streams.write(i, embeddings.inputs[i : i + 1].astype(dtype))
    return streams


def open_streams(
    shape: tuple[int, int, int],
    work_dir: Path,
    activation_dtype: Any,
    *,
    original: bool,
    upcoming: bool,
    batch_size: int,
    dtype: Any,
    sharding: Sharding | None,
    validation_samples: int = 0,
    weights: np.ndarray | None = None,
) -> Streams:
    """Returns the streams of activations [samples, t, d] at the first block's input, to be written.

    The arguments are those of `embed_streams`, and weights as of `Streams`.

    Raises:
      OSError: the disk has no room for them.
    """

    def new_store(name: str) -> ActivationStore:
        return ActivationStore(work_dir / f"{name}.bin", shape, activation_dtype)

    return Streams(
        compressed=new_store("compressed"),
        original=new_store("original") if original else None,
        upcoming=new_store("upcoming") if upcoming else None,
        batch_size=batch_size,
        dtype=dtype,
        sharding=sharding,
        validation_samples=validation_samples,
        weights=weights,
    )
