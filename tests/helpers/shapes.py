"""Public functions with the shapes and dtypes of their docstrings, which beartype checks at every call.

The annotations are here and not in the package, which does not depend on jaxtyping. A size that a signature names twice
is the same number both times. Letters: m vectors, n codes, g weights per vector; i input channels, o outputs, c codes
per channel; b sequences of t positions. `_` is a size of its own.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from beartype import beartype
from jaxtyping import Array, Float, Float32, Int, Int32, Key, UInt8, UInt16, jaxtyped

from cluscomp_jax import kmeans
from cluscomp_jax.clustering import error_feedback
from cluscomp_jax.clustering import refine as refine_module
from cluscomp_jax.clustering.code_search import CodeSearch
from cluscomp_jax.core import cholesky, losses
from cluscomp_jax.core import codebook as codebook_module
from cluscomp_jax.core import linear as linear_module

Numbers = jax.Array | np.ndarray
Factor = tuple[Int32[Array, "i"], Float32[Array, "i i"]]
Index = UInt8[Array, "_ _"] | UInt16[Array, "_ _"]


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function, whose calls raise `jaxtyping.TypeCheckError` where they break its annotations."""
    return jaxtyped(typechecker=beartype)(function)


@checked
def decode(
    codebook: Float[Array, "n g"], index: Index, *, shape: tuple[int, int], axis: Literal["out", "in"]
) -> Float[Array, "{shape[0]} {shape[1]}"]:
    return codebook_module.decode(codebook_module.CodebookArray(codebook, index, shape, axis))


@checked
def linear(
    x: Float[Array, "*b {kernel.shape[0]}"],
    kernel: Float[Array, "_ _"] | codebook_module.CodebookArray,
    bias: Float[Array, "{kernel.shape[1]}"] | None = None,
    *,
    out_dtype: Any = None,
) -> Float[Array, "*b {kernel.shape[1]}"]:
    return linear_module.linear(x, kernel, bias, out_dtype=out_dtype)


@checked
def token_weights(outputs: Float[Array, "b t d"], limit: float) -> Float32[Array, "b t"]:
    return losses.token_weights(outputs, limit)


@checked
def mean_squared_error(
    prediction: Float[Array, "b t d"], target: Float[Array, "b t d"], *, massive_activation_limit: float = 0.0
) -> Float32[Array, ""]:
    return losses.mean_squared_error(prediction, target, massive_activation_limit=massive_activation_limit)


@checked
def token_nll(logits: Float[Array, "*b vocab"], targets: Int[Array, "*b"]) -> Float32[Array, "*b"]:
    return losses.token_nll(logits, targets)


@checked
def divergence(
    teacher: Float[Array, "*b vocab"], student: Float[Array, "*b vocab"], temperature: float
) -> Float32[Array, "*b"]:
    return losses.divergence(teacher, student, temperature)


@checked
def blocked_cholesky(matrix: Float32[Array, "i i"]) -> Float32[Array, "i i"]:
    return cholesky.blocked_cholesky(matrix)


@checked
def assign(
    vectors: Float[Array, "m g"], codebook: Float[Array, "n g"]
) -> tuple[Int32[Array, "m"], Float32[Array, "m"]]:
    return kmeans.assign(vectors, codebook)


@checked
def fit_codebook(
    vectors: Float[Numbers, "m g"],
    *,
    num_codes: int,
    key: Key[Array, ""],
    weights: Float[Numbers, "m"] | None = None,
    iterations: int = 20,
) -> tuple[Float32[Array, "{num_codes} g"], Int32[Array, "m"], kmeans.KMeansStats]:
    return kmeans.fit_codebook(vectors, num_codes=num_codes, key=key, weights=weights, iterations=iterations)


@checked
def nearest_code(
    vectors: Float[Array, "m g"],
    codebook: Float32[Array, "n g"],
    code_index: kmeans.CodeIndex | None,
    previous: Int32[Array, "m"] | None = None,
) -> Int32[Array, "m"]:
    return kmeans.nearest_code(vectors, codebook, code_index, previous)


@checked
def factor_hessian(hessian: Float32[Array, "i i"], *, damping: float = 0.01, shrinkage: float = 0.0) -> Factor:
    return error_feedback.factor_hessian(hessian, damping=damping, shrinkage=shrinkage)


@checked
def assign_with_error_feedback(
    weight: Float[Array, "i o"],
    codebook: Float[Array, "n g"],
    factor: Factor,
    search: CodeSearch,
) -> Int32[Array, "i {-(-weight.shape[1]//codebook.shape[1])}"]:
    return error_feedback.assign_with_error_feedback(weight, codebook, factor_of(factor), search)


@checked
def refine(
    weight: Float[Array, "i o"],
    codebook: Float[Array, "n g"],
    index: Int[Array, "i c"],
    factor: Factor,
    search: CodeSearch,
    *,
    rounds: int,
    key: Key[Array, ""],
) -> tuple[Float32[Array, "n g"], Int32[Array, "i c"]]:
    found = factor_of(factor)
    return refine_module.refine(weight, codebook, index, found, search, rounds=rounds, key=key)


def factor_of(parts: tuple[jax.Array, jax.Array]) -> error_feedback.HessianFactor:
    """Returns the HessianFactor of (act_order, root)."""
    return error_feedback.HessianFactor(*parts)
