"""RunConfig: everything a compression run depends on, and its strict TOML form."""

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cluscomp_jax.errors import InputError
from cluscomp_jax.settings import CalibrationSettings, ClusterSettings, TuningSettings

Recipe = Literal["default", "paper"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What `compress` does.

    Attributes:
      model: the family's config (LlamaConfig); None only until a model has been opened.
      cluster, calibration: settings of those stages.
      tuning: None leaves the clustered codebooks as they are (the paper's ClusComp-minus).
      seed: non-negative; with the same inputs it fixes every bit of the result.
      device_memory_gib: largest device memory of compression, > 0: forward passes take as many samples together as it
        allows, and a stage that needs more is refused before any work. Bits of the result can change with the number
        of samples. None: 2,048 tokens together, and no check.
    """

    model: Any = None
    cluster: ClusterSettings = ClusterSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    tuning: TuningSettings | None = TuningSettings()
    seed: int = 42
    device_memory_gib: float | None = None

    def __post_init__(self) -> None:
        budget = self.device_memory_gib
        if budget is not None and not 0 < budget < math.inf:
            raise InputError(f"device_memory_gib is {budget}; it must be a number above 0")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; it must be from 0 to 2**63-1")
        if self.tuning is not None:
            train = self.calibration.samples - self.tuning.held_out
            if train < 1:
                raise InputError(
                    f"held_out is {self.tuning.held_out} of {self.calibration.samples} samples; "
                    "at least one must be left to tune on"
                )
            if train % self.tuning.batch_size:
                raise InputError(
                    f"batch_size {self.tuning.batch_size} does not divide the {train} samples "
                    "left to tune on; choose one that does"
                )

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as plain JSON values, less the model."""
        fields = dataclasses.asdict(dataclasses.replace(self, model=None))
        del fields["model"]
        return fields


PAPER = RunConfig(
    cluster=ClusterSettings(
        weighted=False,
        feedback=False,
        correction=False,
        sequential=False,
        refits=0,
        mixed="none",
        outlier_limit=0.0,
    ),
    tuning=TuningSettings(
        epochs=20, learning_rate=0.005, schedule="constant", weight_decay=0.1, norms=False, outlier_limit=0.0
    ),
)
"""The official recipe: blind k-means; AdamW at a constant 0.005, weight decay 0.1, 20 epochs.

One thing differs: a block that ends worse than it began keeps its clustered codebooks (`TuningSettings`).
"""

RECIPES: dict[str, RunConfig] = {"default": RunConfig(), "paper": PAPER}


def load_config(path: str | Path, *, recipe: Recipe | None = None) -> RunConfig:
    """Returns the RunConfig of a TOML file: tables [cluster], [[cluster.rules]], [calibration], [tuning].

    A top-level `recipe` names the defaults that the file's keys override; `tuning = false` turns tuning off.

    Args:
      path: of the file.
      recipe: the defaults where the file names none.

    Raises:
      InputError: no such file, not TOML, a key nobody reads, a value of the wrong type or range, or a recipe in the
        file that is not the one asked for, or a bit budget beside the g or num_codes that it would replace.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"config {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"config {path}: not UTF-8 text") from error
    try:
        fields = tomllib.loads(text)
        if recipe is not None and fields.setdefault("recipe", recipe) != recipe:
            raise InputError(
                f"recipe is {fields['recipe']!r} there, but {recipe!r} was asked for; leave one of them out"
            )
        config = from_dict(fields)
        _refuse_codes_beside_budget(fields.get("cluster", {}))
        return config
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"config {path}: not valid TOML: {error}") from error
    except InputError as error:
        raise InputError(f"config {path}: {error}") from error


def _refuse_codes_beside_budget(cluster: Mapping[str, Any]) -> None:
    """Not in `from_dict`: settings of a run name every value, those that a budget replaces too."""
    for i, rule in enumerate(cluster.get("rules", ())):
        own = [name for name in ("g", "num_codes") if name in rule]
        if own and "bits" in cluster:
            raise InputError(
                f"'cluster.rules[{i}].{own[0]}' is {rule[own[0]]}, but the budget 'cluster.bits' = {cluster['bits']} "
                "chooses g and num_codes; leave one of them out"
            )


def from_dict(fields: Mapping[str, Any]) -> RunConfig:
    """Returns the RunConfig of nested plain values; the inverse of `RunConfig.to_dict`.

    Raises:
      InputError: an unknown recipe, an unknown key, or a value of the wrong type or range.
    """
    fields = dict(fields)
    recipe = fields.pop("recipe", "default")
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise InputError(f"recipe is {recipe!r}; it must be one of {', '.join(sorted(RECIPES))}")
    if fields.get("tuning", ...) is False:
        fields["tuning"] = None
    config = _overlay(RECIPES[recipe], fields, where="")
    assert isinstance(config, RunConfig)
    return config


def _overlay(base: Any, fields: Mapping[str, Any], where: str) -> Any:
    """Returns the dataclass `base` with `fields` in place of its values, checked by its annotations."""
    hints = typing.get_type_hints(type(base))
    known = [field.name for field in dataclasses.fields(base) if field.name != "model"]
    changes = {}
    for key, value in fields.items():
        name = f"{where}{key}"
        if key not in known:
            raise InputError(f"key {name!r} is not known; known here: {', '.join(known)}")
        changes[key] = _coerce(hints[key], value, getattr(base, key), name)
    return dataclasses.replace(base, **changes)


def _coerce(hint: Any, value: Any, current: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        hint = next(argument for argument in arguments if argument is not type(None))
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InputError(f"{name!r} is {value!r}; it must be a table")
        return _overlay(current if current is not None else hint(), value, f"{name}.")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{name!r} is {value!r}; it must be a list")
        element = arguments[0]
        return tuple(_coerce(element, item, None, f"{name}[{i}]") for i, item in enumerate(value))
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{name!r} is {value!r}; it must be one of {', '.join(map(repr, arguments))}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise InputError(f"{name!r} is {value!r}; it must be {hint.__name__}")
    return value
