"""Kernels of the codebook-lookup matmul. Arrays in, arrays out; imports nothing of cluscomp_jax."""

from pallas_kernels.codebook_matmul import codebook_matmul, decode

__all__ = ["codebook_matmul", "decode"]
