"""The definition in jnp: decode, and the gradient of a codebook. The only decode there is, and the CPU path.

Letters: n codes, g weights per code, d_in, d_out the sides of the matrix, p = ceil(cut side / g) vectors
along the cut side. Of a trellis index: n = 2^L, every vector adds b bits ("step_bits") to a stream of 32-bit words,
least significant bit first, one stream for each line along the cut side; code j is the window of L bits that begins at
bit j*b.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp

Axis = Literal["out", "in"]


def window_bits(num_codes: int) -> int:
    """Returns L, the bits of a window that names one of 2^L codes."""
    return num_codes.bit_length() - 1


def stream_bits(vectors: int, num_codes: int, step_bits: int) -> int:
    """Returns the bits of the stream of a line of that many vectors: L - b, and b for each."""
    return window_bits(num_codes) - step_bits + vectors * step_bits


def stream_words(vectors: int, num_codes: int, step_bits: int) -> int:
    """Returns the 32-bit words of the stream of a line of that many vectors."""
    return -(-stream_bits(vectors, num_codes, step_bits) // 32)


def codes_of(
    index: jax.Array, *, shape: tuple[int, int], num_codes: int, g: int, axis: Axis, step_bits: int | None
) -> jax.Array:
    """Returns the code of every vector, an integer array [d_in, p] for axis "out", [p, d_out] for "in".

    Args:
      index: those codes; or the streams uint32 [d_in, words] for axis "out", [words, d_out] for "in".
      shape: (d_in, d_out).
      num_codes: n; of a trellis index 2^L, at most 2^16.
      g: weights per code.
      axis: that is cut.
      step_bits: b of a trellis index, 1 to L; None: the index is not one.
    """
    if step_bits is None:
        return index
    window, streams = window_bits(num_codes), index if axis == "out" else index.T
    vectors = -(-shape[1 if axis == "out" else 0] // g)
    period = 32 // math.gcd(step_bits, 32)  # after so many vectors a window begins with a word again
    words, blocks = period * step_bits // 32, -(-vectors // period)
    padded = jnp.pad(streams, ((0, 0), (0, max(blocks * words + 1 - streams.shape[1], 0))))

    def word(k: int) -> jax.Array:
        return padded[:, k : k + (blocks - 1) * words + 1 : words, None]

    parts = []  # of a period: the windows that begin in its first word, in its second, ...
    for k in range(words):
        shifts = [place * step_bits - 32 * k for place in range(period) if place * step_bits // 32 == k]
        shift = jnp.array(shifts, jnp.uint32)
        bits = word(k) >> shift
        if shifts[-1] + window > 32:
            bits = bits | (word(k + 1) << 1) << (31 - shift)  # a shift by 32 is not defined
        parts.append((bits & (num_codes - 1)).astype(jnp.uint16))
    codes = jnp.concatenate(parts, axis=2).reshape(len(streams), blocks * period)[:, :vectors]
    return codes if axis == "out" else codes.T


def streams_of(codes: jax.Array, *, num_codes: int, axis: Axis, step_bits: int) -> jax.Array:
    """Returns the streams uint32 [d_in, words] for axis "out", [words, d_out] for "in", whose windows are the codes.

    Args:
      codes: integers [d_in, p] for axis "out", [p, d_out] for "in"; the low L - b bits of each are the high ones of
        the code before it.
      num_codes: n = 2^L.
      axis: that is cut.
      step_bits: b, 1 to L.
    """
    lines = (codes if axis == "out" else codes.T).astype(jnp.uint32)
    kept = window_bits(num_codes) - step_bits  # the first bits are those of the first code, then b of every code
    words = stream_words(lines.shape[1], num_codes, step_bits)
    place, shift = jnp.divmod(kept + step_bits * jnp.arange(lines.shape[1], dtype=jnp.int32), 32)
    added, shift = lines >> kept, shift.astype(jnp.uint32)
    # No two summands have a bit in common. The last word but one takes what is beyond the stream: nothing.
    streams = jnp.zeros((len(lines), words + 1), jnp.uint32).at[:, place].add(added << shift)
    streams = streams.at[:, place + 1].add((added >> 1) >> (31 - shift))[:, :words]
    streams = streams.at[:, 0].add(lines[:, 0] & ((1 << kept) - 1))
    return streams if axis == "out" else streams.T


def decode(
    codebook: jax.Array, index: jax.Array, *, shape: tuple[int, int], axis: Axis, step_bits: int | None = None
) -> jax.Array:
    """Returns W [d_in, d_out] in the codebook's dtype.

    Args:
      codebook: [n, g].
      index: integer, [d_in, p] for axis "out", [p, d_out] for axis "in"; every entry < n. With `step_bits`: streams, as
        in `codes_of`.
      shape: (d_in, d_out).
      axis: "out": W[i, j*g+t] = codebook[code[i, j], t]; "in": W[j*g+t, o] = codebook[code[j, o], t].
      step_bits: b of a trellis index; None: the index has the codes themselves.
    """
    d_in, d_out = shape
    n, g = codebook.shape
    codes = codes_of(index, shape=shape, num_codes=n, g=g, axis=axis, step_bits=step_bits)
    if step_bits is not None:  # XLA's CPU gathers twice as fast by 16-bit codes in memory as by windows it just cut out
        codes = jax.lax.optimization_barrier(codes)  # type: ignore[no-untyped-call]
    vectors = codebook.at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")
    if axis == "out":
        return vectors.reshape(d_in, codes.shape[1] * g)[:, :d_out]
    return vectors.transpose(0, 2, 1).reshape(codes.shape[0] * g, d_out)[:d_in]


def codebook_gradient(d_weight: jax.Array, index: jax.Array, *, num_codes: int, g: int, axis: Axis) -> jax.Array:
    """Returns the gradient [n, g], float32, of a codebook from that of its decoded matrix [d_in, d_out].

    Args:
      d_weight: [d_in, d_out].
      index: the codes, as `codes_of` gives them.
      num_codes, g: the codebook's shape.
      axis: that is cut.
    """
    d_in, d_out = d_weight.shape
    if axis == "out":
        padded = jnp.pad(d_weight, ((0, 0), (0, index.shape[1] * g - d_out)))
        vectors = padded.reshape(-1, g)
    else:
        padded = jnp.pad(d_weight, ((0, index.shape[0] * g - d_in), (0, 0)))
        vectors = padded.reshape(index.shape[0], g, d_out).transpose(0, 2, 1).reshape(-1, g)
    zeros = jnp.zeros((num_codes, g), jnp.float32)
    flat = index.reshape(-1).astype(jnp.int32)
    return zeros.at[flat].add(vectors.astype(jnp.float32), mode="promise_in_bounds")
