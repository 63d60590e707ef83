"""From the options of `compress` to its CompressConfig: recipe, then config file, then options. Reads no model."""

import dataclasses
from typing import Any, TypeVar

from cluscomp_jax.cli.arguments import CompressArguments
from cluscomp_jax.cli.mesh import parse_mesh
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.data import CalibrationConfig
from cluscomp_jax.config.recovery import RecoveryConfig
from cluscomp_jax.config.run import RECIPES, CompressConfig, load_config
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.calibration import is_embeddings

Settings = TypeVar("Settings", CompressionRule, CalibrationConfig, BlockTuningConfig)
_NEEDED_BY = {
    "calibration": ("samples", "length", "sample_offsets", "epochs", "learning_rate", "recover", "unweighted"),
    "evaluate": ("context", "tokens"),
}
_CODES = ("g", "num_codes", "step_bits")
_NEED_TUNING = ("epochs", "learning_rate")


def run_config(arguments: CompressArguments) -> CompressConfig:
    """Returns the settings of a run, without its model.

    Without --calibration nothing can be tuned. A bare command is then clustering only; one that asks for tuning or
    recovery, by a recipe, a config file or an option, is refused.

    Raises:
      InputError: options that contradict each other or the config file, or a value out of its range.
    """
    _refuse_contradictions(arguments)
    if arguments.config is not None:
        config = load_config(arguments.config, recipe=arguments.recipe)
    else:
        config = RECIPES[arguments.recipe or "default"]
    for name in _NEED_TUNING:
        if config.tuning is None and getattr(arguments, name) is not None:
            raise InputError(
                f"{_given(arguments, name)}, but {arguments.config or arguments.recipe} turns tuning off; "
                "leave one of them out"
            )
    changed = dataclasses.replace(
        config,
        cluster=_cluster(arguments, config.cluster),
        calibration=_calibration(arguments, config.calibration),
        tuning=_tuning(arguments, config.tuning),
        recovery=_recovery(arguments, config.recovery),
        seed=config.seed if arguments.seed is None else arguments.seed,
        mesh=config.mesh if arguments.mesh is None else parse_mesh(arguments.mesh),
    )
    asked = arguments.config or arguments.recipe
    if changed.cluster.mixed_precision == "per_matrix" and arguments.calibration is None:
        raise InputError(
            f"mixed_precision is {changed.cluster.mixed_precision!r}, which spends a budget by sensitivities that are "
            "measured with --calibration TEXT; add that, or --mixed-precision none"
        )
    if changed.tuning is not None and arguments.calibration is None:
        if asked is not None:
            raise InputError(
                f"{asked} asks for tuning, which needs --calibration TEXT; --no-tuning for clustering only"
            )
        changed = dataclasses.replace(changed, tuning=None)
    if changed.recovery is not None and arguments.calibration is None:
        raise InputError(f"{asked} asks for recovery, which needs --calibration TEXT; add that, or --recover 0")
    read = changed.cluster.calibrated or changed.tuning is not None or changed.recovery is not None
    if arguments.calibration is not None and not read:
        raise InputError(
            f"{_given(arguments, 'calibration')} has no effect where clustering is unweighted and nothing is tuned or "
            "recovered; leave it out, or turn one of them on"
        )
    return changed


def _refuse_contradictions(arguments: CompressArguments) -> None:
    for name in _CODES:
        if arguments.bits is not None and getattr(arguments, name) is not None:
            raise InputError(
                f"{_given(arguments, name)} and --bits {arguments.bits}: the budget chooses it; leave one out"
            )
    if arguments.mixed_precision == "per_matrix" and arguments.unweighted:
        raise InputError(
            f"{_given(arguments, 'mixed_precision')} and --unweighted contradict each other; leave one out"
        )
    for name in _NEED_TUNING:
        if arguments.no_tuning and getattr(arguments, name) is not None:
            raise InputError(f"{_given(arguments, name)} and --no-tuning contradict each other; leave one out")
    for name in ("context", "tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 2:
            raise InputError(f"{_given(arguments, name)}: it must be 2 or more")
    _refuse_samples(arguments)
    for needed, names in _NEEDED_BY.items():
        for name in names:
            if getattr(arguments, needed) is None and _asks(arguments, name):
                raise InputError(
                    f"{_given(arguments, name)} has no effect without --{needed} TEXT; add that, or leave it out"
                )
    no_text = arguments.calibration is None or is_embeddings(arguments.calibration)
    if arguments.begin_windows and no_text and arguments.evaluate is None:
        raise InputError(
            "--begin-windows has no effect without a text, --calibration TEXT or --evaluate TEXT; add one, or leave it "
            "out"
        )


def _refuse_samples(arguments: CompressArguments) -> None:
    """Raises InputError where options that cut a text into samples are given with embeddings."""
    if arguments.calibration is None or not is_embeddings(arguments.calibration):
        return
    for name in ("samples", "length", "sample_offsets"):
        if getattr(arguments, name) is not None:
            raise InputError(
                f"{_given(arguments, name)} has no effect on embeddings, {arguments.calibration}, which are samples "
                "already; leave it out"
            )


def _asks(arguments: CompressArguments, name: str) -> bool:
    """Returns whether an option is given that asks for something; `--recover 0` turns a stage off."""
    value = getattr(arguments, name)
    return value is not None and value is not False and (name, value) != ("recover", 0)


def _given(arguments: CompressArguments, name: str) -> str:
    flag, value = f"--{name.replace('_', '-')}", getattr(arguments, name)
    return flag if value is True else f"{flag} {value}"


def _cluster(arguments: CompressArguments, settings: ClusterConfig) -> ClusterConfig:
    rules = tuple(_replaced(rule, arguments, "num_codes", "step_bits", "axis") for rule in settings.rules)
    if arguments.g is not None:
        rules = tuple(dataclasses.replace(rule, group_size=arguments.g) for rule in rules)
    names = ("mixed_precision", "coding", "tie_codebooks", "export")
    alone: dict[str, Any] = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.unweighted:
        alone |= {"weighted": False, "error_feedback": False, "mixed_precision": "none"}
    if arguments.bits is not None:
        alone["bits"] = arguments.bits
    elif any(getattr(arguments, name) is not None for name in _CODES):
        alone = {"mixed_precision": "auto", "coding": "auto", **alone, "bits": None}
    return dataclasses.replace(settings, rules=rules, **alone)


def _calibration(arguments: CompressArguments, settings: CalibrationConfig) -> CalibrationConfig:
    settings = _replaced(settings, arguments, "samples", "length", "sample_offsets")
    return dataclasses.replace(settings, begin_windows=True) if arguments.begin_windows else settings


def _tuning(arguments: CompressArguments, settings: BlockTuningConfig | None) -> BlockTuningConfig | None:
    if settings is None or arguments.no_tuning:
        return None
    return _replaced(settings, arguments, "epochs", "learning_rate")


def _recovery(arguments: CompressArguments, settings: RecoveryConfig | None) -> RecoveryConfig | None:
    if arguments.recover is None:
        return settings
    if arguments.recover < 0:
        raise InputError(f"{_given(arguments, 'recover')}: it must be 0 or more")
    return (
        None if arguments.recover == 0 else dataclasses.replace(settings or RecoveryConfig(), steps=arguments.recover)
    )


def _replaced(settings: Settings, arguments: CompressArguments, *names: str) -> Settings:
    """Returns the settings with every named option that was given in place of its value."""
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return dataclasses.replace(settings, **given)
