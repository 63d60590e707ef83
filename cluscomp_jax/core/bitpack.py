"""Bit packing: unsigned integers of b bits each, laid end to end in bytes. Knows nothing of models or files.

The packed form of x_0, x_1, … is one stream of bits, least significant first: bit t of x_k is bit k*b + t of the
stream, and bit s of the stream is bit s % 8 of byte s // 8, where bit 0 of a byte is worth 1. The unused high bits
of the last byte are 0. With b = 8 these are the bytes themselves, with b = 16 little-endian 16-bit words, and with
b = 0 (a codebook of one code) nothing is stored.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from cluscomp_jax.errors import InputError

MAX_BITS = 16
_LANES = 8  # eight values of b bits fill b whole bytes, so every group of eight starts on a byte
_GROUPS_PER_STEP = 1 << 17  # about 1M values, and so about 20 MB of scratch, however long the array


def packed_bytes(count: int, bits: int) -> int:
    """Returns the bytes that `count` values of `bits` bits take: ceil(count * bits / 8)."""
    return -(-count * bits // 8)


def pack(index: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """Returns the values of `index`, in C order, packed to `bits` bits each: uint8 [packed_bytes(index.size, bits)].

    Args:
      index: integers of any shape, 0 <= index < 2**bits.
      bits: 0 to 16.

    Raises:
      InputError: `bits` is out of range, or a value is negative or does not fit.
    """
    _check_bits(bits)
    values = np.ascontiguousarray(index).reshape(-1)
    if values.size and (int(values.max()) >> bits or int(values.min()) < 0):
        raise InputError(f"index runs from {values.min()} to {values.max()}; {bits} bits hold 0 to {2**bits - 1}")
    packed = np.zeros(packed_bytes(values.size, bits), np.uint8)
    for start in range(0, values.size if bits else 0, _GROUPS_PER_STEP * _LANES):
        step = _pack_groups(values[start : start + _GROUPS_PER_STEP * _LANES], bits)
        first = start * bits // 8
        packed[first : first + step.size] = step[: packed.size - first]
    return packed


def unpack(packed: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[Any]:
    """Returns the `count` values that `pack` packed: [count], uint8 if bits <= 8, else uint16.

    Args:
      packed: uint8 [packed_bytes(count, bits)].
      bits: 0 to 16.
      count: how many values to return, at least 0.

    Raises:
      InputError: `bits` is out of range, or `packed` has another length or dtype than these values take.
    """
    _check_bits(bits)
    expected = packed_bytes(count, bits)
    if packed.dtype != np.uint8 or packed.shape != (expected,):
        raise InputError(
            f"packed index is {packed.dtype} {list(packed.shape)}; {count} values of {bits} bits are uint8 [{expected}]"
        )
    values = np.zeros(count, np.uint8 if bits <= 8 else np.uint16)
    for start in range(0, count if bits else 0, _GROUPS_PER_STEP * _LANES):
        first = start * bits // 8
        step = _unpack_groups(packed[first : first + _GROUPS_PER_STEP * bits], bits)
        values[start : start + step.size] = step[: count - start]
    return values


def _check_bits(bits: int) -> None:
    if not 0 <= bits <= MAX_BITS:
        raise InputError(f"bits is {bits}; an index entry takes 0 to {MAX_BITS} bits")


def _spans(bits: int) -> list[tuple[int, int, int]]:
    """Returns (first byte, shift within it, bytes touched) of each of the eight values of a group."""
    starts = [divmod(lane * bits, 8) for lane in range(_LANES)]
    return [(byte, shift, -(-(shift + bits) // 8)) for byte, shift in starts]


def _pack_groups(values: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """Returns the bytes of whole groups; the last group is filled up with zeros."""
    groups = -(-values.size // _LANES)
    filled = np.zeros((groups, _LANES), np.uint32)
    filled.reshape(-1)[: values.size] = values
    lanes = np.ascontiguousarray(filled.T)
    columns = np.zeros((bits, groups), np.uint8)
    for lane, (byte, shift, touched) in zip(lanes, _spans(bits), strict=True):
        shifted = lane << np.uint32(shift)
        for k in range(touched):
            columns[byte + k] |= (shifted >> np.uint32(8 * k)).astype(np.uint8)
    return np.ascontiguousarray(columns.T).reshape(-1)


def _unpack_groups(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[Any]:
    """Returns the values of the groups in `packed`; the last group may be short of bytes, which count as zeros."""
    groups = -(-packed.size // bits)
    filled = np.zeros((groups, bits), np.uint8)
    filled.reshape(-1)[: packed.size] = packed
    columns = np.ascontiguousarray(filled.T).astype(np.uint32)
    lanes = np.empty((_LANES, groups), np.uint8 if bits <= 8 else np.uint16)
    for lane, (byte, shift, touched) in zip(lanes, _spans(bits), strict=True):
        word = columns[byte].copy()
        for k in range(1, touched):
            word |= columns[byte + k] << np.uint32(8 * k)
        lane[:] = (word >> np.uint32(shift)) & np.uint32(2**bits - 1)
    return np.ascontiguousarray(lanes.T).reshape(-1)


def pack_lines(words: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """Returns the first `bits` bits of every line, laid end to end in the order of `pack`: uint8 [ceil(lines*bits/8)].

    Args:
      words: uint32 [lines, words], the least significant bit of the first word first.
      bits: 1 to 32 * words.
    """
    lines = np.ascontiguousarray(words.astype("<u4", copy=False)).view(np.uint8)
    packed = np.zeros(packed_bytes(len(lines), bits), np.uint8)
    for start, step in _line_steps(len(lines), bits):
        ordered = np.unpackbits(lines[start : start + step], axis=1, count=bits, bitorder="little")
        part = np.packbits(ordered.reshape(-1), bitorder="little")
        packed[start * bits // 8 : start * bits // 8 + part.size] = part
    return packed


def unpack_lines(packed: npt.NDArray[np.uint8], bits: int, lines: int) -> npt.NDArray[np.uint32]:
    """Returns the lines that `pack_lines` packed: uint32 [lines, ceil(bits/32)], 0 after the last bit.

    Raises:
      InputError: `packed` has another length or dtype than these lines take, or bits after the last line.
    """
    expected = packed_bytes(lines, bits)
    if packed.dtype != np.uint8 or packed.shape != (expected,):
        raise InputError(
            f"packed index is {packed.dtype} {list(packed.shape)}; {lines} streams of {bits} bits are uint8 "
            f"[{expected}]"
        )
    spare = -lines * bits % 8
    if spare and packed[-1] >> (8 - spare):
        raise InputError(f"packed index has bits after its {lines} streams of {bits} bits")
    words = np.zeros((lines, -(-bits // 32) * 4), np.uint8)
    for start, step in _line_steps(lines, bits):
        part = packed[start * bits // 8 : packed_bytes(start + step, bits)]
        ordered = np.unpackbits(part, count=step * bits, bitorder="little").reshape(step, bits)
        filled = np.packbits(ordered, axis=1, bitorder="little")
        words[start : start + step, : filled.shape[1]] = filled
    return words.view("<u4").astype(np.uint32, copy=False)


def _line_steps(lines: int, bits: int) -> list[tuple[int, int]]:
    """Returns (first, count) of lines that are treated at a time; all but the last end on a whole byte."""
    step = max(_LANES, (_GROUPS_PER_STEP * _LANES // bits) // _LANES * _LANES)
    return [(start, min(step, lines - start)) for start in range(0, lines, step)]
