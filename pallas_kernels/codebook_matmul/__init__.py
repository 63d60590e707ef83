"""x @ W where W is stored as a codebook and an index."""

from pallas_kernels.codebook_matmul.api import ATOMIC_GRADIENTS, codebook_matmul
from pallas_kernels.codebook_matmul.definition import (
    codes_of,
    decode,
    stream_bits,
    stream_words,
    streams_of,
    window_bits,
)
from pallas_kernels.implementation import IMPLEMENTATION

__all__ = [
    "ATOMIC_GRADIENTS",
    "IMPLEMENTATION",
    "codebook_matmul",
    "codes_of",
    "decode",
    "stream_bits",
    "stream_words",
    "streams_of",
    "window_bits",
]
