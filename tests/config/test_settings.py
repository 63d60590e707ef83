import math
from typing import Any

import pytest

from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.data import CalibrationConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.errors import InputError

BAD: list[tuple[type, dict[str, Any]]] = [
    (CompressionRule, {"group_size": 0}),
    (CompressionRule, {"group_size": 33}),
    (CompressionRule, {"num_codes": 0}),
    (CompressionRule, {"num_codes": 65537}),
    (CompressionRule, {"axis": "both"}),
    (CompressionRule, {"step_bits": 0, "num_codes": 256}),
    (CompressionRule, {"step_bits": 9, "num_codes": 256}),
    (CompressionRule, {"num_codes": 1000, "step_bits": 4}),
    (ClusterConfig, {"coding": "wavelet", "bits": 2.0}),
    (ClusterConfig, {"coding": "trellis"}),
    (ClusterConfig, {"tie_codebooks": "block", "bits": 2.0, "coding": "trellis"}),
    (ClusterConfig, {"export": "aqlm", "bits": 2.0, "coding": "trellis"}),
    (ClusterConfig, {"mixed_precision": "per_matrix", "bits": 2.0, "tie_codebooks": "input"}),
    (ClusterConfig, {"export": "aqlm", "rules": (CompressionRule(num_codes=256, step_bits=4),)}),
    (ClusterConfig, {"tie_codebooks": "input", "rules": (CompressionRule(num_codes=256, step_bits=4),)}),
    (ClusterConfig, {"rules": ()}),
    (ClusterConfig, {"bits": 0.0}),
    (ClusterConfig, {"bits": math.nan}),
    (ClusterConfig, {"iterations": -1}),
    (ClusterConfig, {"damping": 0.0}),
    (ClusterConfig, {"shrinkage": -0.1}),
    (ClusterConfig, {"shrinkage": 1.0}),
    (ClusterConfig, {"shrinkage": math.nan}),
    (ClusterConfig, {"codebook_dtype": "float32"}),
    (CalibrationConfig, {"samples": 0}),
    (CalibrationConfig, {"length": 1}),
    (BlockTuningConfig, {"epochs": -1}),
    (BlockTuningConfig, {"batch_size": 0}),
    (BlockTuningConfig, {"learning_rate": 0.0}),
    (BlockTuningConfig, {"learning_rate": math.inf}),
    (BlockTuningConfig, {"schedule": "step"}),
    (BlockTuningConfig, {"warmup_fraction": 1.5}),
    (BlockTuningConfig, {"weight_decay": -0.1}),
    (BlockTuningConfig, {"clip_norm": 0.0}),
    (BlockTuningConfig, {"compute_dtype": "int8"}),
    (BlockTuningConfig, {"activation_dtype": "float64"}),
    (BlockTuningConfig, {"validation_samples": -1}),
]


@pytest.mark.parametrize(("kind", "fields"), BAD, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_a_value_out_of_range_is_named_with_what_it_must_be(kind: type, fields: dict[str, Any]) -> None:
    (name, value) = next(iter(fields.items()))
    with pytest.raises(InputError) as caught:
        kind(**fields)
    assert str(caught.value).startswith(f"{name} is {value!r}; it must be ")
    assert "\n" not in str(caught.value)


GOOD: list[tuple[type, dict[str, Any]]] = [
    (CompressionRule, {"group_size": 1, "num_codes": 2}),
    (CompressionRule, {"group_size": 32, "num_codes": 65536, "axis": "in"}),
    (CompressionRule, {"group_size": 1, "num_codes": 65536, "step_bits": 16}),
    (CompressionRule, {"group_size": 32, "num_codes": 2, "step_bits": 1}),
    (ClusterConfig, {"bits": 0.5, "iterations": 0}),
    (CalibrationConfig, {"samples": 1, "length": 2}),
    (BlockTuningConfig, {"epochs": 0, "warmup_fraction": 1.0, "weight_decay": 0.0, "clip_norm": 1e-3}),
]


@pytest.mark.parametrize(("kind", "fields"), GOOD)
def test_the_ends_of_each_range_are_legal_and_the_settings_hashable(kind: type, fields: dict[str, Any]) -> None:
    assert hash(kind(**fields)) == hash(kind(**fields))
