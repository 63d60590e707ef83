from pathlib import Path
from typing import Any

import pytest

from cluscomp_jax.cli.arguments import CompressArguments
from cluscomp_jax.cli.overrides import run_config
from cluscomp_jax.config.mesh import MeshConfig
from cluscomp_jax.config.recovery import RecoveryConfig
from cluscomp_jax.config.run import PAPER, RECIPES, CompressConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.errors import InputError


def config_of(**options: Any) -> CompressConfig:
    return run_config(CompressArguments(model="m", out="o", **options))


def tuning_of(config: CompressConfig) -> BlockTuningConfig:
    assert config.tuning is not None
    return config.tuning


def test_options_go_over_the_file_which_goes_over_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        'recipe = "paper"\nseed = 5\n[calibration]\nsamples = 8\n[tuning]\nepochs = 6\nlearning_rate = 0.1\n'
    )
    config = config_of(config=str(path), calibration="t", epochs=2, length=64)
    assert (config.seed, config.calibration.samples, config.calibration.length) == (5, 8, 64)
    assert (tuning_of(config).epochs, tuning_of(config).learning_rate) == (2, 0.1)
    assert tuning_of(config).schedule == "constant"


def test_every_option_reaches_its_setting() -> None:
    config = config_of(
        calibration="t",
        samples=3,
        length=9,
        sample_offsets="s",
        epochs=1,
        learning_rate=0.5,
        seed=11,
        axis="in",
        g=5,
        unweighted=True,
        mesh="data=2",
    )
    assert config.mesh == MeshConfig(data=2)
    assert config.calibration.samples == 3
    assert config.calibration.length == 9
    assert config.calibration.sample_offsets == "s"
    assert (tuning_of(config).epochs, tuning_of(config).learning_rate, config.seed) == (1, 0.5, 11)
    (rule,) = config.cluster.rules
    assert (rule.group_size, rule.axis, config.cluster.calibrated) == (5, "in", False)
    assert config_of(bits=2.0, calibration="t").cluster.mixed_precision == "auto"
    assert config_of(bits=2.0, mixed_precision="per_matrix", calibration="t").cluster.mixed_precision == "per_matrix"
    assert config_of(bits=2.0, unweighted=True, calibration="t").cluster.mixed_precision == "none"
    assert config_of(bits=2.0, mixed_precision="none").cluster.mixed_precision == "none"
    assert config_of(tie_codebooks="input").cluster.tie_codebooks == "input"
    assert config_of().cluster.tie_codebooks == "none"


def test_a_recipe_alone_is_that_recipe() -> None:
    assert config_of(recipe="paper", calibration="t") == PAPER
    assert config_of(calibration="t") == RECIPES["default"]


def test_recovery_is_turned_on_by_its_steps_and_off_by_none() -> None:
    assert config_of(calibration="t", recover=7).recovery == RecoveryConfig(steps=7)
    best = config_of(recipe="best", calibration="t")
    assert best == RECIPES["best"]
    assert best.recovery is not None
    assert config_of(recipe="best", calibration="t", recover=0).recovery is None
    assert config_of(calibration="t", unweighted=True, no_tuning=True, recover=7).tuning is None
    with pytest.raises(InputError, match="best asks for recovery, which needs --calibration"):
        config_of(recipe="best", no_tuning=True)


def test_own_codes_replace_a_budget_and_a_budget_own_codes(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[cluster]\nbits = 3.0\n[[cluster.rules]]\npattern = "a"\n[[cluster.rules]]\npattern = "b"\n')
    own = config_of(config=str(path), g=7, num_codes=99, no_tuning=True).cluster
    assert own.bits is None
    assert [(rule.pattern, rule.group_size, rule.num_codes) for rule in own.rules] == [("a", 7, 99), ("b", 7, 99)]
    path.write_text("[[cluster.rules]]\ngroup_size = 7\n")
    assert config_of(config=str(path), bits=2.0, no_tuning=True).cluster.bits == 2.0


def test_a_bare_command_without_calibration_only_clusters() -> None:
    assert config_of().tuning is None
    assert config_of(no_tuning=True, calibration="t").tuning is None


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "budget and g": ({"bits": 2.0, "g": 4}, "--g 4 and --bits 2.0"),
    "budget and num_codes": ({"bits": 2.0, "num_codes": 4}, "--num-codes 4 and --bits 2.0"),
    "epochs but no tuning": ({"calibration": "t", "epochs": 2, "no_tuning": True}, "--epochs 2 and --no-tuning"),
    "rate but no tuning": ({"calibration": "t", "learning_rate": 0.1, "no_tuning": True}, "--learning-rate 0.1"),
    "samples without text": ({"samples": 4}, "--samples 4 has no effect without --calibration"),
    "starts without text": ({"sample_offsets": "f"}, "--sample-offsets f has no effect without --calibration"),
    "weights without text": ({"unweighted": True}, "--unweighted has no effect without --calibration"),
    "mixed without text": (
        {"mixed_precision": "per_matrix", "bits": 2.0},
        "mixed_precision is 'per_matrix', which spends a budget by sensitivities",
    ),
    "mixed without a budget": (
        {"mixed_precision": "per_matrix", "calibration": "t"},
        "mixed_precision is 'per_matrix'; it must be 'none' without a budget",
    ),
    "mixed and unweighted": (
        {"mixed_precision": "per_matrix", "bits": 2.0, "calibration": "t", "unweighted": True},
        "--mixed-precision per_matrix and --unweighted contradict each other",
    ),
    "mixed for aqlm": (
        {"mixed_precision": "per_matrix", "bits": 2.0, "calibration": "t", "export": "aqlm"},
        "mixed_precision is 'per_matrix'; it must be 'none' where export is 'aqlm'",
    ),
    "text that nothing reads": (
        {"calibration": "t", "unweighted": True, "no_tuning": True},
        "--calibration t has no effect where clustering is unweighted and nothing is tuned or recovered",
    ),
    "text that nothing of the recipe reads": (
        {"calibration": "t", "recipe": "paper", "no_tuning": True},
        "--calibration t has no effect",
    ),
    "window of nothing": ({"context": 64}, "--context 64 has no effect without --evaluate"),
    "tokens of nothing": ({"tokens": 64}, "--tokens 64 has no effect without --evaluate"),
    "epochs of a recipe without tuning": (
        {"recipe": "fast", "calibration": "t", "epochs": 2},
        "--epochs 2, but fast turns tuning off",
    ),
    "no epochs without text": ({"epochs": 0}, "--epochs 0 has no effect without --calibration"),
    "recovery without text": ({"recover": 3}, "--recover 3 has no effect without --calibration"),
    "recovery of fewer than no steps": ({"recover": -1, "calibration": "t"}, "--recover -1: it must be 0 or more"),
    "recovery on several devices": (
        {"recover": 3, "calibration": "t", "mesh": "data=2"},
        "recovery: batch_size is 1, mesh data=2,fsdp=1,tensor=1 spreads its rows over 2 devices",
    ),
    "recipe without text": ({"recipe": "paper"}, "paper asks for tuning, which needs --calibration"),
    "window of one": ({"context": 1}, "--context 1: it must be 2 or more"),
    "nothing to score": ({"tokens": 0}, "--tokens 0: it must be 2 or more"),
    "no codes": ({"num_codes": 0}, "num_codes is 0; it must be 2 to 65536"),
    "too many codes": ({"num_codes": 65537}, "num_codes is 65537"),
    "no group": ({"g": 0}, "group_size is 0; it must be 1 to 32"),
    "too large a group": ({"g": 33}, "group_size is 33"),
    "negative bits": ({"bits": -1.0}, "bits is -1.0"),
    "negative seed": ({"seed": -1}, "seed is -1"),
    "mesh of parts": ({"mesh": "data=2,tensor=2"}, "mesh is data=2,fsdp=1,tensor=2; compression holds one block"),
    "mesh without a size": ({"mesh": "data"}, "--mesh 'data': 'data' must be AXIS=SIZE"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_contradictions_and_bad_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_of(**options)


def test_a_config_that_tunes_is_not_half_obeyed(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("seed = 1")
    with pytest.raises(InputError, match="asks for tuning, which needs --calibration"):
        config_of(config=str(path))
    path.write_text("tuning = false")
    assert config_of(config=str(path)).tuning is None
    with pytest.raises(InputError, match="turns tuning off"):
        config_of(config=str(path), calibration="t", epochs=2)
