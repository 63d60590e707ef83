import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from cluscomp_jax.cli.demo import SETTINGS
from cluscomp_jax.config.clustering import ClusterConfig
from cluscomp_jax.config.data import CalibrationConfig
from cluscomp_jax.config.recovery import RecoveryConfig
from cluscomp_jax.config.run import PAPER, RECIPES, CompressConfig, from_dict, load_config
from cluscomp_jax.config.training import DistillationConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.errors import InputError

CONFIGS = ROOT / "configs"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_an_empty_file_is_the_default_recipe(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == RECIPES["default"]


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_keys_override_the_recipe_and_leave_the_rest(tmp_path: Path, recipe: str) -> None:
    config = load_config(write(tmp_path, f'recipe = "{recipe}"\nseed = 7\n[tuning]\nepochs = 3\n'))
    base = RECIPES[recipe]
    tuning = base.tuning or BlockTuningConfig()
    assert config == dataclasses.replace(base, seed=7, tuning=dataclasses.replace(tuning, epochs=3))


def test_a_recipe_asked_for_fills_in_but_never_contradicts(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, ""), recipe="paper") == PAPER
    assert load_config(write(tmp_path, 'recipe = "paper"'), recipe="paper") == PAPER
    with pytest.raises(InputError, match=r"'paper' there, but 'default'"):
        load_config(write(tmp_path, 'recipe = "paper"'), recipe="default")


def test_stages_can_be_turned_off(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "tuning = false")).tuning is None
    assert load_config(write(tmp_path, 'recipe = "best"\nrecovery = false')).recovery is None


def test_a_table_turns_recovery_on(tmp_path: Path) -> None:
    text = "[recovery]\nsteps = 9\n[recovery.distillation]\nweight = 0.5\n"
    expected = RecoveryConfig(steps=9, distillation=DistillationConfig(weight=0.5))
    assert load_config(write(tmp_path, text)).recovery == expected


def test_settings_without_recovery_are_recorded_as_they_were_before_there_was_one() -> None:
    assert "recovery" not in CompressConfig().to_dict()


@pytest.mark.parametrize("config", [*RECIPES.values(), CompressConfig(tuning=None, cluster=ClusterConfig(bits=2.5))])
def test_the_json_form_gives_the_config_back(config: CompressConfig) -> None:
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_integer_serves_where_a_number_is_wanted(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "[cluster]\nbits = 3")).cluster.bits == 3.0


BAD = {
    "unknown key": ("sede = 1", "'sede' is not known; known here: .*seed"),
    "unknown key in a table": ("[tuning]\nlr = 1.0", r"'tuning\.lr' is not known"),
    "unknown key in a rule": ("[[cluster.rules]]\nn = 4", r"'cluster\.rules\[0\]\.n' is not known"),
    "the model": ('model = "llama"', "'model' is not known"),
    "text for an integer": ('seed = "1"', "'seed' is '1'; it must be int"),
    "a fraction for an integer": ("[calibration]\nsamples = 1.5", r"'calibration\.samples' is 1\.5; it must be int"),
    "true for an integer": ("seed = true", "'seed' is True; it must be int"),
    "true for a number": ("[tuning]\nlearning_rate = true", "it must be float"),
    "an integer for true": ("[cluster]\nweighted = 1", "it must be bool"),
    "a word for a table": ('cluster = "none"', "it must be a table"),
    "true for tuning": ("tuning = true", "it must be a table"),
    "a table for a list": ("[cluster.rules]\ngroup_size = 4", "it must be a list"),
    "an unknown choice": ('[tuning]\nschedule = "step"', "it must be one of 'constant', 'cosine', 'linear'"),
    "an unknown recipe": ('recipe = "worst"', "recipe is 'worst'; it must be one of best, default, fast, paper"),
    "a recipe that is no name": ("recipe = [1]", "recipe is"),
    "a value out of range": ("[[cluster.rules]]\ngroup_size = 33", "group_size is 33; it must be 1 to 32"),
    "a negative seed": ("seed = -1", "seed is -1"),
    "all samples for validation": (
        "[calibration]\nsamples = 4\n[tuning]\nvalidation_samples = 4",
        "validation_samples is 4 of 4 samples",
    ),
    "batch that does not divide": ("[calibration]\nsamples = 4\n[tuning]\nbatch_size = 3", "3 does not divide the 4"),
    "no TOML": ("seed = ", "not valid TOML"),
    "a budget and a group": (
        '[cluster]\nbits = 3\n[[cluster.rules]]\npattern = "a"\n[[cluster.rules]]\ngroup_size = 4',
        r"'cluster\.rules\[1\]\.group_size' is 4, but the budget 'cluster\.bits' = 3 chooses g, num_codes and step",
    ),
    "a budget and codes": ("[cluster]\nbits = 3\n[[cluster.rules]]\nnum_codes = 9", r"num_codes' is 9, but"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_a_bad_file_is_named_with_its_reason_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.toml: No such file"):
        load_config(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b"# \xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        load_config(tmp_path / "latin.toml")


def test_the_paper_config_is_the_paper_recipe() -> None:
    assert load_config(CONFIGS / "paper.toml") == PAPER
    assert PAPER.tuning == BlockTuningConfig(
        epochs=20,
        learning_rate=0.005,
        relative_rate=False,
        schedule="constant",
        weight_decay=0.1,
        norms=False,
        massive_activation_limit=0.0,
    )
    assert PAPER.calibration == CalibrationConfig(samples=128, length=2048)
    assert not PAPER.cluster.calibrated
    assert PAPER.cluster.mixed_precision == "none"


def test_the_demo_runs_its_config() -> None:
    assert load_config(CONFIGS / "smollm2_135m_3bit.toml") == SETTINGS


def test_no_config_can_name_a_model() -> None:
    fields: dict[str, Any] = CompressConfig().to_dict()
    assert "model" not in fields
