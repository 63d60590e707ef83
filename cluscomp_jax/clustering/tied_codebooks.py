"""Tied codebooks: which kernels of a block share one codebook, and how it is fitted.

A codebook of many codes costs a small model more than its indices gain; kernels that share it divide the cost.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax import kmeans
from cluscomp_jax.clustering.coders import channel_mass, to_vectors
from cluscomp_jax.clustering.matrix import SharedStart
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule, TieCodebooks
from cluscomp_jax.core import codebook as cb

Rules = Mapping[str, CompressionRule]


def sharing_groups(
    input_groups: Mapping[str, Sequence[str]], rules: Rules, tie_codebooks: TieCodebooks
) -> list[tuple[str, ...]]:
    """Returns the paths of a block's kernels with a codebook in common, two or more each, the owner first.

    Kernels that are cut differently (g, num_codes, axis) do not share one.

    Args:
      input_groups: {input group: block-relative paths of its kernels}.
      rules: {block-relative path: rule} of what is compressed.
      tie_codebooks: "none", "input" or "block".
    """
    if tie_codebooks == "none":
        return []
    groups: dict[tuple[Any, ...], list[str]] = {}
    for group, paths in input_groups.items():
        for path in paths:
            if path in rules:
                cut = dataclasses.astuple(dataclasses.replace(rules[path], pattern=""))
                groups.setdefault((group if tie_codebooks == "input" else None, *cut), []).append(path)
    return [tuple(paths) for paths in groups.values() if len(paths) > 1]


def fit_shared(
    kernels: Mapping[str, Any],
    rule: CompressionRule,
    settings: ClusterConfig,
    *,
    key: jax.Array,
    channel_weights: Mapping[str, Any],
) -> dict[str, SharedStart]:
    """Returns {path: codebook and first codes} of kernels that share a codebook, the first of which stores it.

    An error counts as a share of its own kernel's mean weighted square, so that a kernel of
    small weights counts as much as one of large weights.

    Args:
      kernels: {path: [d_in, d_out]}, the owner first.
      rule: gives g, num_codes and axis.
      settings: iterations and codebook_dtype are used.
      key: same key, same bytes.
      channel_weights: {path: [d_in] >= 0, the weight of each input channel's error}, for axis "out"; may lack kernels.

    Raises:
      InputError: weights that are not finite.
    """
    began = time.monotonic()
    vectors, weights = [], []  # on the host: the device holds one kernel at a time, and later all that k-means needs
    for path, kernel in kernels.items():
        own = np.array(to_vectors(jnp.asarray(kernel), g=rule.group_size, axis=rule.axis))
        given = channel_weights.get(path)
        mass = np.ones(1, np.float32) if given is None else np.array(channel_mass(jnp.asarray(given)))
        counted = np.repeat(mass, len(own) // len(mass))
        energy = float(np.sum(counted * np.einsum("mg,mg->m", own, own), dtype=np.float64))
        vectors.append(own)
        weights.append(counted * np.float32(np.prod(kernel.shape) / energy if energy > 0 else 1.0))
    sizes = [len(own) for own in vectors]
    codes, index, _ = kmeans.fit_codebook(
        jnp.asarray(np.concatenate(vectors)),
        num_codes=rule.num_codes,
        key=key,
        weights=jnp.asarray(np.concatenate(weights)),
        iterations=settings.iterations,
    )
    codebook = np.array(cb.round_codebook(codes, settings.codebook_dtype))
    first = next(iter(kernels))
    parts = np.split(np.array(index), np.cumsum(sizes)[:-1])
    starts = {path: SharedStart(first, codebook, part, 0.0) for path, part in zip(kernels, parts, strict=True)}
    return starts | {first: starts[first]._replace(owner=None, seconds=time.monotonic() - began)}
