"""CompressConfig: everything a compression run depends on, and its strict TOML form."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cluscomp_jax.config.clustering import ClusterConfig
from cluscomp_jax.config.data import CalibrationConfig
from cluscomp_jax.config.mesh import MeshConfig
from cluscomp_jax.config.recovery import RecoveryConfig
from cluscomp_jax.config.toml import overlay, read_toml
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.errors import InputError

Recipe = Literal["fast", "default", "best", "paper"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """What `compress` does.

    Attributes:
      model: the family's config (LlamaConfig); None only until a model has been opened.
      cluster, calibration: settings of those stages.
      tuning: None leaves the clustered codebooks as they are (the paper's ClusComp-minus).
      recovery: the whole model follows the original after the last block; None: it does not.
      seed: non-negative; with the same inputs it fixes every bit of the result.
      device_memory_gib: largest device memory of compression, > 0: forward passes take as many samples together as it
        allows, and a stage that needs more is refused before any work; nothing is checked without calibration, and
        neither the measure of sensitivities (`cluster.mixed_precision`) nor recovery is counted. Bits of the result
        can change with the number of samples. None: 2,048 tokens together, and no check.
      mesh: how many devices share the samples of a batch and the matrices to be clustered: its data axis; the others
        are 1. Bits of the result change with it. A tuning batch that it does not divide is computed whole on each.
    """

    model: Any = None
    cluster: ClusterConfig = ClusterConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    tuning: BlockTuningConfig | None = BlockTuningConfig()
    recovery: RecoveryConfig | None = None
    seed: int = 42
    device_memory_gib: float | None = None
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        budget = self.device_memory_gib
        if budget is not None and not 0 < budget < math.inf:
            raise InputError(f"device_memory_gib is {budget}; it must be a number above 0")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}; it must be from 0 to 2**32-1")
        if self.mesh.size != self.mesh.data:
            raise InputError(
                f"mesh is {self.mesh}; compression holds one block at a time and spreads samples and matrices alone: "
                "use data, leave fsdp and tensor out"
            )
        if self.recovery is not None:
            self.recovery.finetune_config(self.mesh)
        if self.tuning is not None:
            train = self.calibration.samples - self.tuning.validation_samples
            if train < 1:
                raise InputError(
                    f"validation_samples is {self.tuning.validation_samples} of {self.calibration.samples} samples; "
                    "at least one must be left to tune on"
                )
            if train % self.tuning.batch_size:
                raise InputError(
                    f"batch_size {self.tuning.batch_size} does not divide the {train} samples "
                    "left to tune on; choose one that does"
                )

    @property
    def activation_stores(self) -> frozenset[str]:
        """Names of the stores of activations that a run on calibration has (`cluscomp_jax.models.streams.Streams`)."""
        original = self.tuning is not None or self.cluster.corrects
        wanted = {
            "compressed": self.tuning is not None or self.cluster.calibrated,
            "original": original,
            "upcoming": original and self.cluster.weighs_positions,
        }
        return frozenset(name for name, is_wanted in wanted.items() if is_wanted)

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as plain JSON values, less the model."""
        fields = dataclasses.asdict(dataclasses.replace(self, model=None))
        del fields["model"]
        if self.recovery is None:  # as settings were recorded before there was a recovery
            del fields["recovery"]
        if not self.calibration.begin_windows:  # as settings were recorded before samples could begin with a token
            del fields["calibration"]["begin_windows"]
        if not self.cluster.uneven:  # as settings were recorded before outputs could be weighted
            del fields["cluster"]["weighted_outputs"]
        for rule in fields["cluster"]["rules"]:
            if rule["axes"] is None:  # a decoder's kernels need none
                del rule["axes"]
        return fields


PAPER = CompressConfig(
    cluster=ClusterConfig(
        weighted=False,
        error_feedback=False,
        drift_correction=False,
        true_sequential=False,
        refine_rounds=0,
        mixed_precision="none",
        coding="plain",
        massive_activation_limit=0.0,
    ),
    tuning=BlockTuningConfig(
        epochs=20,
        learning_rate=0.005,
        relative_rate=False,
        schedule="constant",
        weight_decay=0.1,
        norms=False,
        massive_activation_limit=0.0,
    ),
)
"""The official recipe: blind k-means; AdamW at a constant 0.005, weight decay 0.1, 20 epochs.

One thing differs: a block that ends worse than it began keeps its clustered codebooks (`BlockTuningConfig`).
"""

RECIPES: dict[str, CompressConfig] = {
    "fast": CompressConfig(tuning=None),
    "default": CompressConfig(),
    "best": CompressConfig(recovery=RecoveryConfig()),
    "paper": PAPER,
}
"""What a run starts from, by name; docs/compress.md says what each costs and gives."""


def load_config(path: str | Path, *, recipe: Recipe | None = None) -> CompressConfig:
    """Returns the CompressConfig of a TOML file.

    Its tables are [cluster], [[cluster.rules]], [calibration], [tuning] and [recovery]. A top-level `recipe` names the
    defaults that the file's keys override; `tuning = false` and `recovery = false` turn a stage off.

    Args:
      path: of the file.
      recipe: the defaults where the file names none.

    Raises:
      InputError: no such file, not TOML, a key nobody reads, a value of the wrong type or range, or a recipe in the
        file that is not the one asked for, or a bit budget together with the g, num_codes or step_bits that it would
        replace.
    """
    fields = read_toml(path)
    try:
        if recipe is not None and fields.setdefault("recipe", recipe) != recipe:
            raise InputError(
                f"recipe is {fields['recipe']!r} there, but {recipe!r} was asked for; leave one of them out"
            )
        config = from_dict(fields)
        _refuse_codes_beside_budget(fields.get("cluster", {}))
        return config
    except InputError as error:
        raise InputError(f"config {path}: {error}") from error


def _refuse_codes_beside_budget(cluster: Mapping[str, Any]) -> None:
    """Not in `from_dict`: settings of a run name every value, those that a budget replaces too."""
    for i, rule in enumerate(cluster.get("rules", ())):
        own = [name for name in ("group_size", "num_codes", "step_bits") if name in rule]
        if own and "bits" in cluster:
            raise InputError(
                f"'cluster.rules[{i}].{own[0]}' is {rule[own[0]]}, but the budget 'cluster.bits' = {cluster['bits']} "
                "chooses g, num_codes and step_bits; leave one of them out"
            )


def from_dict(fields: Mapping[str, Any]) -> CompressConfig:
    """Returns the CompressConfig of nested plain values; the inverse of `CompressConfig.to_dict`.

    Raises:
      InputError: an unknown recipe, an unknown key, or a value of the wrong type or range.
    """
    fields = dict(fields)
    recipe = fields.pop("recipe", "default")
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise InputError(f"recipe is {recipe!r}; it must be one of {', '.join(sorted(RECIPES))}")
    for stage in ("tuning", "recovery"):
        if fields.get(stage, ...) is False:
            fields[stage] = None
    config = overlay(RECIPES[recipe], fields, others=("recipe",))
    assert isinstance(config, CompressConfig)
    return config
