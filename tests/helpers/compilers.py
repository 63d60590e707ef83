"""What a test may need of JAX's compilers for cards that are not here."""

import importlib.util

import pytest

needs_compiler = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)),
    reason="JAX's CUDA compiler is not installed (extra aot)",
)
