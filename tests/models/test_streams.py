"""The original block's outputs, computed once: for the weights of positions, and as the next original stream."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from cluscomp_jax.models.streams import Streams, open_streams

SAMPLES, LENGTH, WIDTH = 5, 3, 4


def opened(folder: Path, *, original: bool = True, upcoming: bool) -> Streams:
    """Returns streams of the same normal numbers, whose last batch is smaller."""
    folder.mkdir()
    streams = open_streams(
        (SAMPLES, LENGTH, WIDTH),
        folder,
        np.float32,
        original=original,
        upcoming=upcoming,
        batch_size=2,
        dtype=np.float32,
        sharding=None,
    )
    values = np.random.default_rng(0).normal(size=(SAMPLES, 1, LENGTH, WIDTH))
    for i, sample in enumerate(values):
        streams.write(i, sample)
    return streams


@pytest.fixture
def counted() -> tuple[Callable[[jax.Array], jax.Array], list[int]]:
    """Returns (a block, the sizes of the batches that it was given)."""
    sizes: list[int] = []

    def block(x: jax.Array) -> jax.Array:
        sizes.append(len(x))
        return x**3 + x

    return block, sizes


def test_outputs_kept_for_the_weights_of_positions_are_the_next_original_stream(tmp_path, counted):
    block, sizes = counted
    twice, once = opened(tmp_path / "a", upcoming=False), opened(tmp_path / "b", upcoming=True)
    np.testing.assert_array_equal(twice.token_weights(block, 1.5), once.token_weights(block, 1.5))
    inputs = once.original.read(slice(None)).copy()
    np.testing.assert_array_equal(inputs, once.compressed.read(slice(None)), "the inputs are still there")
    twice.pass_original(block)
    sizes.clear()
    once.pass_original(None)
    assert sizes == []
    outputs = once.original.read(slice(None))
    np.testing.assert_array_equal(outputs, twice.original.read(slice(None)))
    np.testing.assert_allclose(outputs, inputs**3 + inputs, rtol=1e-5)
    np.testing.assert_array_equal(once.compressed.read(slice(None)), inputs)


def test_block_after_block_without_a_copy_left_over(tmp_path, counted):
    """What is kept of one block is never taken for the outputs of the next."""
    block, _ = counted
    kept, plain = opened(tmp_path / "a", upcoming=True), opened(tmp_path / "b", upcoming=False)
    for limit in (1.5, 2.0, 1.5):
        np.testing.assert_array_equal(kept.token_weights(block, limit), plain.token_weights(block, limit))
        kept.pass_original(None)
        plain.pass_original(block)
        np.testing.assert_array_equal(kept.original.read(slice(None)), plain.original.read(slice(None)))
    kept.delete()
    assert not list((tmp_path / "a").iterdir())


def test_without_an_original_stream_the_compressed_one_is_weighed(tmp_path, counted):
    block, sizes = counted
    streams = opened(tmp_path / "a", original=False, upcoming=False)
    weights = streams.token_weights(block, 1.5)
    assert weights.shape == (SAMPLES, LENGTH)
    assert sizes == [2, 2, 1]
    streams.pass_original(None)
    np.testing.assert_array_equal(streams.token_weights(block, 1.5), weights)
