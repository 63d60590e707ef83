"""x @ W where W is stored as a codebook and an index."""

from pallas_kernels.codebook_matmul.api import codebook_matmul
from pallas_kernels.codebook_matmul.definition import decode

__all__ = ["codebook_matmul", "decode"]
