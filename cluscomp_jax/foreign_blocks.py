"""compress_blocks: the whole method for a stack of blocks of another codebase, calibrated and tuned.

A user of the same pipeline as `compress`. Embedding, head and everything between stay the host's own.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.clustering.summary import CompressionSummary
from cluscomp_jax.clustering.tree import check_leaf, checked_rules, rule_of
from cluscomp_jax.config.clustering import CompressionRule
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.core import pytrees
from cluscomp_jax.core.caller_mesh import on_one_device, without_mesh
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.host_axes import HostAxes, parse_axes
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.calibration import Embeddings
from cluscomp_jax.models.foreign import Apply, ForeignModel, check_products, is_parameter, read_form
from cluscomp_jax.models.source import DictSink, DictSource
from cluscomp_jax.pipeline import compress_stream
from cluscomp_jax.plan.host import scratch_bytes
from cluscomp_jax.runtime.reporter import Reporter
from cluscomp_jax.runtime.scratch import scratch_folder


def compress_blocks(
    blocks: Sequence[Any],
    apply: Apply,
    inputs: Any,
    cfg: CompressConfig | None = None,
    *,
    rules: Sequence[CompressionRule],
    reporter: Reporter | None = None,
    work_dir: str | Path | None = None,
) -> tuple[list[Any], CompressionSummary]:
    """Returns (the blocks with their matched kernels as CodebookArrays, what was done).

    Blocks are clustered by the Hessians of what their kernels read, corrected for drift and tuned one after another, as
    `compress` does it with a decoder's. Which kernels read one array, and what their products are added to, is found in
    the program of `apply`. Tuning moves the floating leaves of one axis too, norms and biases, where `cfg.tuning.norms`
    says so. What it returns runs in the host's own block by `with_codebooks(apply)`.

    Args:
      blocks: pytrees of one structure, in the order of computation; a stacked tree is taken apart by `unstack`.
      apply: a block: (its parameters, x) -> y of the shape of x. Pure, and the same for all blocks.
      inputs: of the first block, floating [samples, ..., d]: calibration data as the host's embedding gives it.
      cfg: the run; None: the defaults. Its model, and the rules of its cluster settings, are not read.
      rules: the first rule whose pattern matches the whole path of a leaf within its block decides; `axes` as for
        `cluster_tree`, without stacked axes.
      reporter: is told of progress; silent by default.
      work_dir: an existing folder for the streams of activations meanwhile; None: the system's folder for temporary
        files.

    Raises:
      InputError: whatever does not fit, before any long work.
    """
    cfg = cfg or CompressConfig()
    blocks = _checked_blocks(blocks)
    x = _checked_inputs(inputs)
    rules = checked_rules(rules)
    model = ForeignModel(
        apply=apply,
        form=read_form(blocks[0], kernel_axes(blocks[0], rules)),
        item_shape=tuple(x.shape[1:]),
        dtype=jnp.dtype(x.dtype).name,
        depth=len(blocks),
    )
    _check_program(model)
    check_products(model)
    within = tuple(_within(rule, rules, model.form.kernels) for rule in rules)
    if cfg.cluster.mixed_precision == "per_matrix":
        raise InputError("mixed_precision measures a model's loss, which a stack of blocks has not; use 'none'")
    if cfg.recovery is not None:
        raise InputError("recovery follows a model's distributions, which a stack of blocks has not; leave it out")
    cfg = dataclasses.replace(cfg, model=model, cluster=dataclasses.replace(cfg.cluster, rules=within))
    params = {"blocks": {str(i): model.form.to_params(jax.tree.map(on_one_device, b)) for i, b in enumerate(blocks)}}
    shape = (x.shape[0], math.prod(x.shape[1:-1]))
    sink = DictSink()
    with scratch_folder(work_dir, scratch_bytes(model, cfg, shape)) as folder, without_mesh():
        summary = compress_stream(
            DictSource(params, model),
            sink,
            cfg,
            calibration=Embeddings(x.reshape(*shape, x.shape[-1])),
            work_dir=folder,
            reporter=reporter,
            may_grow=False,
            alike=True,  # so that the caller can stack them again
        )
    return [_to_host(model, sink.load_block(i), blocks[i]) for i in range(len(blocks))], summary


def _within(rule: CompressionRule, rules: Sequence[CompressionRule], kernels: Iterable[str]) -> CompressionRule:
    """Returns the rule for the paths of the pipeline's blocks."""
    paths = [re.escape(path) for path in kernels if rule_of(path, rules) is rule]
    if not paths:
        raise InputError(f"rule {rule.pattern!r} decides over no leaf of a block; the first rule that matches decides")
    return dataclasses.replace(rule, pattern=rf"blocks/\d+/(?:{'|'.join(paths)})", axes=None)


def _to_host(model: ForeignModel, block: Params, original: Any) -> Any:
    """Returns the block in the host's form, its arrays NumPy's or JAX's as the host's first one is."""
    first = next(leaf for leaf in jax.tree.leaves(original) if hasattr(leaf, "dtype"))
    put = jnp.asarray if isinstance(first, jax.Array) else np.asarray
    own = dict(pytrees.iterate(original))  # leaves that are no parameters, keys for example, are the block's own

    def leaf_of(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, CodebookArray) and not is_parameter(leaf):
            return own[path]
        return jax.tree.map(put, leaf)

    return pytrees.map_by_path(leaf_of, model.form.to_host(block))


def _checked_blocks(blocks: Any) -> list[Any]:
    if not isinstance(blocks, list | tuple) or not blocks:
        raise InputError(
            f"blocks is a {type(blocks).__name__}; it must be a list of the blocks' parameters (`unstack` takes a "
            "stacked tree apart)"
        )
    first = {path: _kind_of(leaf) for path, leaf in pytrees.iterate(blocks[0])}
    if not first:
        raise InputError("block 0 has no leaves; give the parameters of the blocks")
    structure: Any = jax.tree.structure(blocks[0], is_leaf=pytrees.is_codebook_array)
    for i, block in enumerate(blocks):
        found = {path: _kind_of(leaf) for path, leaf in pytrees.iterate(block)}
        for path in sorted(first.keys() ^ found.keys()):
            raise InputError(f"block {i} differs from block 0 in {path!r}; compress blocks of another form apart")
        for path, kind in first.items():
            if found[path] != kind:
                raise InputError(
                    f"{path!r} is {found[path]} in block {i} and {kind} in block 0; compress blocks that differ apart"
                )
        if jax.tree.structure(block, is_leaf=pytrees.is_codebook_array) != structure:
            raise InputError(f"block {i} has other static fields than block 0; compress blocks that differ apart")
        for path, leaf in pytrees.iterate(block):
            if isinstance(leaf, CodebookArray):
                raise InputError(f"{path!r} of block {i} is clustered already; begin with the original blocks")
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise InputError(
                    f"{path!r} of block {i} is a ShapeDtypeStruct without numbers; load the parameters first"
                )
    return list(blocks)


def _kind_of(leaf: Any) -> Any:
    """Returns what must be equal in two blocks: shape and dtype of an array, and any other leaf itself."""
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else leaf


def _checked_inputs(inputs: Any) -> np.ndarray:
    if isinstance(inputs, list | tuple | str):
        raise InputError(f"inputs is a {type(inputs).__name__}; it must be one array [samples, ..., channels]")
    x = np.asarray(on_one_device(inputs))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(
            f"inputs are {x.dtype}; they are what the first block reads, after the host's embedding: floating"
        )
    if x.ndim < 2 or 0 in x.shape:
        raise InputError(f"inputs have shape {x.shape}; they must be [samples, ..., channels], 1 at least each")
    if not np.isfinite(x.astype(np.float32)).all():
        raise InputError("inputs hold NaN or Inf")
    return x


def kernel_axes(block: Any, rules: Sequence[CompressionRule]) -> dict[str, HostAxes]:
    """Returns {path: axes} of the leaves of a block that a rule matches.

    Raises:
      InputError: a leaf that cannot be clustered, or none.
    """
    kernels: dict[str, HostAxes] = {}
    for path, leaf in pytrees.iterate(block):
        rule = rule_of(path, rules)
        if rule is None:
            continue
        check_leaf(path, leaf)
        kernels[path], stacked = parse_axes(rule.axes, tuple(leaf.shape), leaf.dtype, path)
        if stacked:
            raise InputError(f"{path}: axes {rule.axes!r} stack matrices within a block; `cluster_tree` clusters these")
    if not kernels:
        paths = [path for path, leaf in pytrees.iterate(block) if len(getattr(leaf, "shape", ())) >= 2]
        raise InputError(f"no rule matches a leaf of a block; its arrays of two and more axes: {', '.join(paths[:8])}")
    return kernels


def _check_program(model: ForeignModel) -> None:
    """Raises InputError unless a block keeps the shape of its input."""
    shape = (2, *model.item_shape)
    function, arrays = model.by_arrays(pytrees.shape_struct(shape, model.dtype))
    y = jax.eval_shape(function, *arrays)
    if getattr(y, "shape", None) != shape:
        found = getattr(y, "shape", type(y).__name__)
        raise InputError(f"apply gives {found} of an input {shape}; a block must give one array of its input's shape")
