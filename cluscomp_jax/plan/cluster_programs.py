"""The programs that cluster one block, in the order in which `cluster_block` and `cluster_matrix` call them.

Statistics, drift correction and error feedback are stages of their own. For each program this module adds up what the
device holds in addition to the program's own memory.
"""

from collections.abc import Iterator
from typing import Any

import jax

from cluscomp_jax.clustering import coders, drift_correction, error_feedback, hessian, matrix, refine
from cluscomp_jax.clustering.block import statistics_passes
from cluscomp_jax.clustering.code_search import NearestCodes
from cluscomp_jax.clustering.drift_correction import LayerStatistics
from cluscomp_jax.clustering.error_feedback import HessianFactor
from cluscomp_jax.config.clustering import CompressionRule
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray, decode_arrays, index_arrays
from cluscomp_jax.kmeans.code_index import grow_code_index
from cluscomp_jax.models.model import run_block
from cluscomp_jax.models.streams import Batch, weigh_tokens
from cluscomp_jax.plan.kmeans_programs import STAGE, fit_programs
from cluscomp_jax.plan.program import Program
from cluscomp_jax.plan.setting import STORED, BlockSpec
from cluscomp_jax.plan.shapes import nbytes
from cluscomp_jax.trellis import fit as trellis_fit


def clustering(setting: BlockSpec) -> Iterator[Program]:
    """Yields the programs of one block, in order. Between them the block, codes and roots are on the host."""
    settings = setting.cfg.cluster
    if not settings.error_feedback:
        yield from _without_feedback(setting)
        return
    model, dense = setting.model, setting.dense()
    if settings.weighs_positions:
        x = setting.activations(setting.batch)
        traced = run_block.trace(dense, x, model=model, layer_type=setting.layer_type)
        yield Program("statistics", "outputs", traced, nbytes((dense, x)), setting.passes)
        y = setting.place.like(traced.out_info)
        traced = weigh_tokens.trace(y, limit=settings.massive_activation_limit)
        yield Program("statistics", "token weights", traced, nbytes((dense, x, y)), setting.passes)
    yield from _shared_fits(setting)
    now = trees.flatten(dense)
    passes = statistics_passes(model, setting.shapes, setting.rules, settings)
    for groups in passes:
        sums = yield from _statistics(setting, groups, dense, now)
        if groups == passes[-1]:
            now = {}
        for alike in _alike_groups(setting, groups):
            one, paths = setting.repeated(len(alike)), [_matched(setting, group) for group in alike]
            factor = yield from _factor(one, paths[0], sums[alike[0]])
            for same in zip(*paths, strict=True):
                shape = setting.shapes[same[0]]
                weight = setting.place.array(*shape, dtype="float32" if settings.corrects else STORED)
                array = yield from _matrix(one, same[0], weight, factor)
                if settings.true_sequential and now:
                    traced = decode_arrays.trace(array.codebook, array.index, form=array.form, coding=array.coding)
                    yield Program(STAGE, "decode", traced, nbytes(array), one.blocks)
                    now |= {path: setting.place.like(traced.out_info) for path in same}


def _matched(setting: BlockSpec, group: str) -> list[str]:
    return [path for path in setting.model.input_groups[group] if path in setting.rules]


def _alike_groups(setting: BlockSpec, groups: tuple[str, ...]) -> list[list[str]]:
    """Returns the input groups in lists of those whose kernels have the same shapes and rules: experts of one block."""
    found: dict[Any, list[str]] = {}
    shared = {path for sharing in setting.sharing for path in sharing}
    for group in groups:
        kernels = ((setting.shapes[path], setting.rules[path], path in shared) for path in _matched(setting, group))
        found.setdefault(tuple(kernels), []).append(group)
    return list(found.values())


def _without_feedback(setting: BlockSpec) -> Iterator[Program]:
    dense = setting.dense()
    if setting.cfg.cluster.weighted:
        yield from _squares(setting)
    yield from _shared_fits(setting, measured=True)
    for groups in setting.model.independent_groups:
        for alike in _alike_groups(setting, groups):
            for path in _matched(setting, alike[0]):
                weight = setting.place.array(*setting.shapes[path], dtype=trees.flatten(dense)[path].dtype)
                yield from _matrix(setting.repeated(len(alike)), path, weight, None)


def _squares(setting: BlockSpec) -> Iterator[Program]:
    """Yields the mean squares of all input channels."""
    dense, batch = setting.dense(), _batch(setting)
    fixed = {"model": setting.model, "layer_type": setting.layer_type, "block": dense}
    sums = setting.place.like(hessian.add_squares.trace(None, batch, **fixed).out_info)
    traced = hessian.add_squares.trace(sums, batch, **fixed)
    yield Program("statistics", "squares", traced, nbytes((dense, batch, sums)), setting.passes)
    traced = hessian.divide.trace(sums, setting.place.array(dtype="int32"))
    yield Program("statistics", "means of squares", traced, nbytes((dense, batch, sums)), setting.blocks)


def _batch(setting: BlockSpec, *, original: bool = False) -> Batch:
    """Returns what statistics read at one time, `original`: of both streams."""
    x = setting.activations(setting.batch)
    weights = setting.place.array(*x.shape[:2]) if setting.cfg.cluster.weighs_positions else None
    return Batch(x, x if original else None, weights)


def _shared_fits(setting: BlockSpec, *, measured: bool = False) -> Iterator[Program]:
    """Yields the k-means of codebooks that several kernels share, and E[x_i^2] where it is not `measured` yet."""
    groups, settings = setting.sharing, setting.cfg.cluster
    if groups and settings.weighted and not measured:
        yield from _squares(setting)
    for group in groups:
        rule, m = setting.rules[group[0]], 0
        for path in group:
            weight = trees.flatten(setting.dense())[path]
            traced = coders.to_vectors.trace(weight, g=rule.group_size, axis=rule.axis)
            yield Program(STAGE, "vectors", traced, nbytes(weight), setting.blocks)
            m += traced.out_info.shape[0]
        yield from fit_programs(
            setting.place,
            m,
            rule.group_size,
            rule.num_codes,
            weighted=True,
            iterations=settings.iterations,
            calls=setting.blocks,
        )


def _statistics(setting: BlockSpec, groups: tuple[str, ...], dense: Any, now: dict[str, Any]) -> Any:
    """Yields the statistics of some input groups; returns {input group: fields of `LayerStatistics`}.

    Args:
      now: {path: array} of the block at this point of the run; an array that is also in `dense` is counted once.
    """
    fixed = {"model": setting.model, "layer_type": setting.layer_type, "groups": groups, "block": trees.unflatten(now)}
    add: Any = hessian.add_products
    batch, live = _batch(setting, original=setting.cfg.cluster.corrects), nbytes(now)
    if setting.cfg.cluster.corrects:
        add, fixed = hessian.add_pair, {**fixed, "original": dense}
        live += nbytes([leaf for path, leaf in trees.flatten(dense).items() if leaf is not now[path]])
    sums = setting.place.like(add.trace(None, batch, **fixed).out_info)
    live += nbytes((batch, batch, sums))  # the next batch is being copied
    yield Program("statistics", f"Hessian of {groups[0]}", add.trace(sums, batch, **fixed), live, setting.passes)
    count = setting.place.array(dtype="int32")
    yield Program("statistics", f"means of {groups[0]}", hessian.divide.trace(sums, count), live, setting.blocks)
    means: dict[str, Any] = {}
    for group, own in sums.items():  # the sums have become means in place
        blocks = own["hessian"]
        means[group] = {**own, "hessian": blocks[0]}
        if len(blocks) > 1:
            traced = hessian.assemble.trace(blocks)
            means[group]["hessian"] = setting.place.like(traced.out_info)
            yield Program("statistics", f"whole Hessian of {groups[0]}", traced, live, setting.blocks)
            live += nbytes(means[group]["hessian"]) if len(sums) > 1 else 0
    return means


def _factor(setting: BlockSpec, paths: list[str], sums: dict[str, Any]) -> Any:
    """Yields the drift correction of a group's kernels and the root for error feedback; returns the HessianFactor."""
    statistics, ratio = LayerStatistics(**sums), setting.place.array()
    if setting.cfg.cluster.corrects:
        traced = drift_correction.ridge_root.trace(statistics.hessian, ratio)
        yield Program("correct", "root", traced, nbytes(sums), setting.blocks)
        root = setting.place.like(traced.out_info)
        for path in paths:
            weight = trees.flatten(setting.dense())[path]
            traced = drift_correction.corrected_kernel.trace(weight, root, statistics.drift, statistics.errors)
            yield Program("correct", "kernel", traced, nbytes((sums, weight, root)), setting.blocks)
    traced = error_feedback.factor_damped.trace(statistics.hessian, ratio, ratio)
    yield Program("assign", "root", traced, nbytes(statistics.hessian), setting.blocks)
    return HessianFactor(*setting.place.like(traced.out_info))


def _matrix(setting: BlockSpec, path: str, weight: Any, factor: HessianFactor | None) -> Any:
    """Yields the programs of `cluster_matrix`, kernel and factor copied from the host; returns the CodebookArray."""
    settings, rule, place, calls = setting.cfg.cluster, setting.rules[path], setting.place, setting.blocks
    d_in, d_out = weight.shape
    g, n, form = rule.group_size, rule.num_codes, rule.form((d_in, d_out))
    m = form.lines * form.vectors
    shared = any(path in group for group in setting.sharing)
    if not shared and rule.step_bits is not None:
        yield from _trellis(setting, rule, weight, every_code=factor is None)
    elif not shared:
        weighted = settings.weighted and rule.axis == "out"
        traced = coders.to_vectors.trace(weight, g=g, axis=rule.axis)
        yield Program(STAGE, "vectors", traced, nbytes(weight), calls)
        if weighted:
            vectors = place.like(traced.out_info)
            traced = coders.vector_weights.trace(place.array(d_in), d_out=d_out, g=g)
            yield Program(STAGE, "vector weights", traced, nbytes(vectors), calls)
        yield from fit_programs(place, m, g, n, weighted=weighted, iterations=settings.iterations, calls=calls)
    array = place.compressed((d_in, d_out), rule, settings.codebook_dtype)
    if factor is not None:
        yield from _assigned(setting, rule, weight, array, factor, shared)
    index, mass = place.array(*form.along(form.vectors), dtype="int32"), place.array(d_in)
    traced = index_arrays.trace(index, form=form, coding=rule.coding)
    yield Program(STAGE, "index", traced, nbytes((index, array.codebook)), calls)
    traced = matrix.channel_energies.trace(weight, array, mass)
    yield Program(STAGE, "error", traced, nbytes((index, weight, array, mass)), calls)
    return array


def _trellis(setting: BlockSpec, rule: CompressionRule, weight: Any, *, every_code: bool) -> Iterator[Program]:
    """Yields the programs that fit the codebook of a trellis; `every_code`: and those that choose all codes by it."""
    place, calls, trellis = setting.place, setting.blocks, coders.trellis_of(rule)
    traced = coders.to_lines.trace(weight, g=rule.group_size, axis=rule.axis)
    yield Program(STAGE, "vectors", traced, nbytes(weight), calls)
    lines = place.like(traced.out_info)
    mass, codebook = place.array(lines.shape[0]), place.array(rule.num_codes, rule.group_size)
    places = None
    if "output_weights" in (weights := _output_weights(setting, rule, weight)):
        traced = coders.to_places.trace(weights["output_weights"], g=rule.group_size)
        yield Program(STAGE, "weights of places", traced, nbytes(lines), calls)
        places = place.like(traced.out_info)
    live = nbytes((lines, mass, places, codebook, codebook))
    traced = trellis_fit.draw.trace(lines, mass, place.key(), num_codes=rule.num_codes)
    yield Program(STAGE, "start", traced, nbytes((lines, mass)), calls)
    arguments = (lines, mass, codebook, codebook, place.key(), place.array(), places)
    traced = trellis_fit.improve.trace(*arguments, trellis=trellis)
    yield Program(STAGE, "round", traced, live, calls * setting.cfg.cluster.iterations)
    if every_code:
        traced = trellis_fit.best_codes.trace(lines, codebook, places, trellis=trellis)
        yield Program(STAGE, "codes", traced, nbytes((lines, codebook)), calls)


def _output_weights(setting: BlockSpec, rule: CompressionRule, weight: Any) -> dict[str, Any]:
    """Returns what a coder takes in addition where the errors of outputs do not all count the same."""
    if not (setting.cfg.cluster.weighs_outputs and coders.coder_of(rule).weighs_outputs):
        return {}
    return {"output_weights": setting.place.array(weight.shape[1])}


def _assigned(
    setting: BlockSpec, rule: CompressionRule, weight: Any, array: CodebookArray, factor: HessianFactor, shared: bool
) -> Iterator[Program]:
    """Yields the choice of codes with error feedback and its refine_rounds; a shared codebook is not solved for."""
    refine_rounds, place = setting.cfg.cluster.refine_rounds, setting.place
    live = nbytes((weight, array.codebook, factor))
    stored, codes = array.codebook, place.array(*array.codebook.shape)
    weights = _output_weights(setting, rule, weight)
    search: Any = coders.search_of(rule, **weights)
    search = place.like(jax.eval_shape(search.for_codebook, stored, place.key()))
    if isinstance(search, NearestCodes) and search.code_index is not None:
        traced = grow_code_index.trace(codes, place.key())
        yield Program("assign", "code index", traced, live + nbytes(codes), setting.blocks * max(1, refine_rounds))
    live += nbytes(search)
    traced = error_feedback.assign_with_error_feedback.trace(weight, stored, factor, search)
    yield Program("assign", "codes", traced, live, setting.blocks)
    chosen = place.like(traced.out_info)
    if refine_rounds:
        live += nbytes((chosen, codes))
        traced = refine.curvature_of.trace(factor)
        yield Program("assign", "curvature", traced, live, setting.blocks)
        curvature = place.like(traced.out_info)
        live += nbytes(curvature.hessian)
        traced = refine.reassign_codes.trace(weight, codes, chosen, curvature, search)
        yield Program("assign", "new codes", traced, live, setting.blocks * refine_rounds)
        if not shared:
            traced = refine.update_codebook.trace(weight, codes, chosen, curvature, *weights.values())
            yield Program("assign", "new codebook", traced, live, setting.blocks * refine_rounds)
