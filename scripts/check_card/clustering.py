"""The kernels that search codes; then k-means of a Llama-2-7B gate_proj, error feedback and a refine round: seconds."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from check_card.searches import run_searches
from check_card.step import Step
from cluscomp_jax import kmeans
from cluscomp_jax.clustering.code_search import NearestCodes
from cluscomp_jax.clustering.error_feedback import HessianFactor, assign_with_error_feedback, factor_hessian
from cluscomp_jax.clustering.refine import curvature_of, reassign_codes, update_codebook

G = 4
_CHANNELS = 128
"""Input channels of the measured slice: those that error feedback and a refine round handle in one product."""


@partial(jax.jit, static_argnames="shape")
def weight_like(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns float32 numbers of Student's t with 8 degrees of freedom, times 0.02."""
    normal, *squared = jax.random.normal(key, (9, *shape))
    return 0.02 * normal / jnp.sqrt(sum(map(jnp.square, squared)) / 8)


def seconds_of(call: Callable[[], Any]) -> tuple[Any, float]:
    """Returns (what a call gives, the seconds until it is there)."""
    began = time.perf_counter()
    result = jax.block_until_ready(call())  # type: ignore[no-untyped-call]
    return result, time.perf_counter() - began


def run(step: Step) -> None:
    """Measures the kernels, then the four in turn."""
    run_searches(step)
    d_in, d_out, n = (32, 48, 200) if step.dry else (4096, 11008, 65500)
    iterations = 2 if step.dry else 10
    # Made in eight parts: nine draws of the whole matrix would be on the card together.
    keys = jax.random.split(jax.random.key(0), 8)
    weight = jnp.concatenate([weight_like(key, (d_in // 8, d_out)) for key in keys])
    vectors = weight.reshape(-1, G)
    sizes = {"vectors": len(vectors), "g": G, "codes": n}
    fit = partial(kmeans.fit_codebook, vectors, num_codes=n, key=jax.random.key(1), iterations=iterations)
    (codebook, _, stats), first = seconds_of(fit)
    power = float(jnp.sum(jnp.square(weight)))
    error = stats.inertia[-1] / power
    shared = {**sizes, "iterations": iterations, "relative_error": error, "certified": stats.certified}
    step.fact("k-means, compilation included", seconds=first, reseeded=stats.reseeded, **shared)
    _, warm = seconds_of(fit)
    each = warm / len(vectors) / iterations
    step.fact("k-means, warm", seconds=warm, seconds_per_vector_and_iteration=each, **shared)
    _brute_force(step, vectors, codebook)
    _feedback(step, weight, codebook)


def _brute_force(step: Step, vectors: jax.Array, codebook: jax.Array) -> None:
    """Measures one exact assignment of a slice of the vectors."""
    part = vectors[: 2**20]
    _, first = seconds_of(lambda: kmeans.assign(part, codebook))
    (_, distance), warm = seconds_of(lambda: kmeans.assign(part, codebook))
    step.fact(
        "brute-force pass",
        measured_vectors=len(part),
        measured_seconds=warm,
        seconds_with_compilation=first,
        scaled_seconds=warm * len(vectors) / len(part),
        scaled="to all vectors, in proportion",
        relative_error=float(jnp.sum(distance) / jnp.sum(jnp.square(part))),
    )


def _feedback(step: Step, weight: jax.Array, codebook: jax.Array) -> None:
    """Measures error feedback and a refine round: of one slice of input channels, then whole if time is left."""
    channels = len(weight)
    factor = jax.random.normal(jax.random.key(2), (channels, channels)) / channels**0.5
    hessian = jnp.eye(channels) + jnp.dot(factor, factor.T, precision="highest")
    _, first = seconds_of(lambda: factor_hessian(hessian))
    factor, warm = seconds_of(lambda: factor_hessian(hessian))
    step.fact("root of the Hessian", channels=channels, seconds=warm, seconds_with_compilation=first)
    code_index, built = seconds_of(lambda: kmeans.build_code_index(codebook, jax.random.key(3)))
    step.fact("code index", seconds_with_compilation=built, codes=len(codebook))
    rows = min(_CHANNELS, channels)
    part = factor_hessian(hessian[:rows, :rows])
    took, compiling = _feed_back(step, weight[:rows], codebook, part, code_index, "slice", channels)
    if rows < channels and took * channels / rows + compiling < 0.8 * step.remaining:
        _feed_back(step, weight, codebook, factor, code_index, "whole", channels)


def _feed_back(
    step: Step, weight: jax.Array, codebook: jax.Array, factor: HessianFactor, code_index: Any, what: str, channels: int
) -> tuple[float, float]:
    """Reports the seconds of error feedback and of a refine round; returns (seconds of both, of their compilation)."""
    rows, outputs = weight.shape
    sizes = {"measured": what, "channels": rows, "outputs": outputs, "codes": len(codebook)}

    def report(name: str, took: float, compiling: float) -> None:
        scaled = {"scaled_seconds": took * channels / rows, "scaled": f"to {channels} channels, in proportion"}
        times = {"seconds": took, "compilation_seconds": compiling, "seconds_per_channel": took / rows}
        step.fact(name, **times, **({} if rows == channels else scaled), **sizes)

    arguments = (weight, codebook, factor)
    search = NearestCodes(code_index)
    assign, first = seconds_of_compiling(assign_with_error_feedback.lower(*arguments, search))
    index, took = seconds_of(lambda: assign(*arguments, search))
    report("error feedback", took, first)
    curvature = curvature_of(factor)
    chosen = (weight, codebook, index, curvature)
    improve, second = seconds_of_compiling(reassign_codes.lower(*chosen, search))
    solve, third = seconds_of_compiling(update_codebook.lower(*chosen))
    _, codes_took = seconds_of(lambda: improve(*chosen, search))
    _, codebook_took = seconds_of(lambda: solve(*chosen))
    step.fact("of one refine round", new_codes_seconds=codes_took, new_codebook_seconds=codebook_took, **sizes)
    report("one refine round", codes_took + codebook_took, second + third)
    return took + codes_took + codebook_took, first + second + third


def seconds_of_compiling(lowered: Any) -> tuple[Any, float]:
    """Returns (the compiled program, the seconds it took)."""
    began = time.perf_counter()
    return lowered.compile(), time.perf_counter() - began
