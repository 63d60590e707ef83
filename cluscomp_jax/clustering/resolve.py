"""Checks before any long work: which rule compresses which kernel, and whether the calibration fits."""

import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from cluscomp_jax.clustering import rules as rules_of
from cluscomp_jax.clustering.bit_allocation import allocate_bits, tempered
from cluscomp_jax.clustering.matrix import NOT_IN
from cluscomp_jax.clustering.tied_codebooks import sharing_groups
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule, TieCodebooks
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.core.coding import stored_bits
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.calibration import Calibration, Embeddings, check_embeddings, has_labels
from cluscomp_jax.models.model import Model, check_length, check_tokens, parameter_shapes
from cluscomp_jax.models.tensor_names import refuse_fused_aqlm

Rules = dict[str, CompressionRule]
_LARGEST_BUDGET = 16
_LARGEST_DENSE_BITS = 32


def rules_by_block(
    model: Model, cfg: CompressConfig, sensitivities: Mapping[str, float] | None = None, *, alike: bool = False
) -> list[Rules]:
    """Returns, per block, {block-relative kernel path: rule}, a bit budget already turned into rules.

    Args:
      model: the decoder.
      cfg: the run.
      sensitivities: {path: what an error of that kernel costs} for a budget that is spent unevenly; None: evenly.
      alike: a budget gives all blocks the same, because they are stacked in arrays.

    Raises:
      InputError: a rule matches nothing or something that is no kernel of a block, or the budget cannot be met.
    """
    shapes = parameter_shapes(model)
    blocks = range(model.num_blocks)
    kernels = {
        f"{model.blocks_path}/{i}/{path}" for i in blocks for paths in model.input_groups.values() for path in paths
    }
    rules = cfg.cluster.rules
    matched = rules_of.match(rules, shapes)
    outside = next((path for path in matched if path not in kernels), None)
    if outside is not None:
        raise InputError(
            f"rule {matched[outside].pattern!r} matches {outside!r}; only the kernels of blocks are compressed"
        )
    if cfg.cluster.bits is not None:
        chosen: Rules = {}
        for rule in rules:
            own = {path: shapes[path] for path, first in matched.items() if first is rule}
            if own:
                codebooks = _codebooks(model, own, rule, cfg.cluster.tie_codebooks)
                chosen |= _within_budget(own, rule, cfg.cluster, sensitivities, codebooks, model.blocks_path, alike)
        matched = chosen
    if cfg.cluster.export == "aqlm":
        refuse_fused_aqlm(model.config)
        _check_aqlm(matched, shapes)
    by_block: list[Rules] = []
    for i in range(model.num_blocks):
        prefix = f"{model.blocks_path}/{i}/"
        by_block.append({path.removeprefix(prefix): rule for path, rule in matched.items() if path.startswith(prefix)})
    return by_block


def bits_per_weight(model: Model, cfg: CompressConfig, by_block: list[Rules]) -> float:
    """Returns the stored bits per weight of all matrices that rules compress, shared codebooks counted once."""
    bits, weights = 0, 0
    for i, rules in enumerate(by_block):
        shapes = model.block_shapes(i)
        shared = {
            path for group in sharing_groups(model.input_groups, rules, cfg.cluster.tie_codebooks) for path in group[1:]
        }
        for path, rule in rules.items():
            shape = (shapes[path][0], shapes[path][1])
            bits += stored_bits(rule.form(shape), rule.coding, own=path not in shared)
            weights += shape[0] * shape[1]
    return bits / weights


def refuse_growth(bits: float) -> None:
    """Raises InputError where matrices take more than the 32 bits per weight of float32."""
    if bits > _LARGEST_DENSE_BITS:
        raise InputError(
            f"the rules store {bits:,.1f} bits per weight, more than the {_LARGEST_DENSE_BITS} of float32: codebooks "
            "are larger than what they replace; lower num_codes, or give a budget in bits"
        )


def mixes(cfg: CompressConfig, calibration: Calibration | None) -> bool:
    """Returns whether a bit budget is spent unevenly, by sensitivities measured on the calibration."""
    return cfg.cluster.uneven and has_labels(calibration)


def _within_budget(
    shapes: Mapping[str, tuple[int, ...]],
    rule: CompressionRule,
    settings: ClusterConfig,
    sensitivities: Mapping[str, float] | None,
    codebooks: int,
    blocks_path: str,
    alike: bool,
) -> Rules:
    assert settings.bits is not None
    if settings.bits >= _LARGEST_BUDGET:
        raise InputError(
            f"bits is {settings.bits}; it must be below {_LARGEST_BUDGET}, what a weight takes in bfloat16"
        )
    if settings.plain and not settings.uneven:
        groups = rules_of.groups_for_aqlm(shapes, axis=rule.axis) if settings.export == "aqlm" else rules_of.ALL_GROUPS
        one = rules_of.allocate(shapes, settings.bits, like=rule, groups=groups, codebooks=codebooks)
        return dict.fromkeys(shapes, one)
    costs = None if sensitivities is None else tempered(sensitivities, shapes)
    spend = partial(allocate_bits, shapes, settings.bits, like=rule, coding=settings.coding, costs=costs)
    return spend(projection=partial(_projection, blocks_path), unit=_for_any_expert, alike=alike)


def _projection(blocks_path: str, path: str) -> str:
    """Returns a path within its block, and within any expert."""
    return _for_any_expert(path.removeprefix(f"{blocks_path}/").partition("/")[2])


def _for_any_expert(path: str) -> str:
    """Returns a path with "*" for the number of its expert: the experts of a block have one form, to be stacked."""
    return re.sub(r"/experts/\d+/", "/experts/*/", path)


def _codebooks(model: Model, paths: Collection[str], rule: CompressionRule, tie_codebooks: TieCodebooks) -> int:
    """Returns how many codebooks kernels have to which one rule gives one setting."""
    shared = 0
    for i in range(model.num_blocks):
        prefix = f"{model.blocks_path}/{i}/"
        own = dict.fromkeys((path.removeprefix(prefix) for path in paths if path.startswith(prefix)), rule)
        shared += sum(len(group) - 1 for group in sharing_groups(model.input_groups, own, tie_codebooks))
    return len(paths) - shared


def _check_aqlm(rules: Rules, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError where an AQLM checkpoint could not hold the result."""
    first = next(iter(rules))
    for path, rule in rules.items():
        side = shapes[path][1] if rule.axis == "out" else shapes[path][0]
        if side % rule.group_size:
            raise InputError(
                f"{path}: g = {rule.group_size} does not divide its axis {rule.axis!r} of {side}, as AQLM demands"
            )
        if (rule.group_size, rule.num_codes, rule.axis) != (
            rules[first].group_size,
            rules[first].num_codes,
            rules[first].axis,
        ):
            raise InputError(
                f"{path} has {rules_of.describe(rule)}, {first} has {rules_of.describe(rules[first])}; "
                "AQLM has one setting for the whole model"
            )


def check_calibration(model: Model, cfg: CompressConfig, calibration: Calibration, by_block: list[Rules]) -> None:
    """Raises InputError where calibration tokens or embeddings do not fit the model or the settings."""
    if isinstance(calibration, Embeddings):
        check_samples(cfg, calibration.shape[0], by_block)
        check_embeddings(calibration, model)
        if cfg.cluster.mixed_precision == "per_matrix" and calibration.tokens is None:
            raise InputError(
                "mixed_precision is 'per_matrix', which measures a loss of tokens, and the calibration embeddings have "
                "none; give their tokens too, or set it to 'none'"
            )
        return
    if calibration.ndim != 2 or calibration.shape[0] < 1 or calibration.shape[1] < 2:
        raise InputError(f"calibration has shape {calibration.shape}; it must be [samples, length], 1 and 2 at least")
    check_samples(cfg, calibration.shape[0], by_block)
    check_tokens(calibration, model, "calibration")
    check_length(calibration.shape[1], model, "calibration")


def check_samples(cfg: CompressConfig, samples: int, by_block: list[Rules]) -> None:
    """Raises InputError where the number of calibration samples does not fit the settings."""
    if cfg.tuning is not None:
        train = samples - cfg.tuning.validation_samples
        if train < 1 or train % cfg.tuning.batch_size:
            raise InputError(
                f"calibration has {samples} samples; less {cfg.tuning.validation_samples} held out they must be a "
                f"positive multiple of batch_size {cfg.tuning.batch_size}"
            )
    cut_in = [path for rules in by_block for path, rule in rules.items() if rule.axis == "in"]
    if cfg.cluster.calibrated and cut_in:
        raise InputError(f"{cut_in[0]}: {NOT_IN}")


def check_stacked(model: Model, cfg: CompressConfig, calibration: Calibration | None) -> None:
    """Raises InputError where the blocks, which are stacked in arrays, would not get the same codes and groups."""
    if cfg.cluster.mixed_precision == "per_matrix" and calibration is not None:
        raise InputError(
            "cluster.mixed_precision gives every kernel codes of its own, but the blocks are stacked in arrays; set it "
            'to "none", or unstack the blocks'
        )
    first, *others = rules_by_block(model, cfg, alike=True)
    for i, rules in enumerate(others, start=1):
        for path in first.keys() | rules.keys():
            if first.get(path) != rules.get(path):
                raise InputError(
                    f"the rules of {path} are not the same in blocks 0 and {i}, which are stacked in one array; "
                    "let one rule match both, or unstack the blocks"
                )


def samples_of(calibration: Any) -> Calibration:
    """Returns calibration as embeddings, packed, or as tokens on the host; floating [samples, t, d] are embeddings.

    Raises:
      InputError: texts, or lists of unequal lengths.
    """
    if isinstance(calibration, Embeddings):
        return calibration.packed()
    if isinstance(calibration, str) or (isinstance(calibration, list | tuple) and _has_text(calibration)):
        raise InputError(
            "calibration is text; it must be tokens, int [samples, length]: cluscomp_jax.load_tokens reads a file, "
            "cluscomp_jax.calibration_samples cuts its tokens into samples"
        )
    if isinstance(calibration, list | tuple):
        lengths = {len(sample) for sample in calibration if hasattr(sample, "__len__")}
        if len(lengths) > 1:
            raise InputError(
                f"calibration is a list of samples of {min(lengths)} to {max(lengths)} tokens; all must have one "
                "length: cluscomp_jax.calibration_samples cuts tokens into samples"
            )
    found = np.asarray(calibration)
    return Embeddings(found) if found.ndim == 3 and not np.issubdtype(found.dtype, np.integer) else found


def _has_text(calibration: Sequence[Any]) -> bool:
    return any(isinstance(sample, str) for sample in calibration)
