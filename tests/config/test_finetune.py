"""FinetuneConfig and its TOML form."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
from paths import ROOT

from cluscomp_jax.config.data import DataConfig
from cluscomp_jax.config.finetune import FinetuneConfig, load_finetune_config
from cluscomp_jax.config.mesh import MeshConfig
from cluscomp_jax.config.toml import overlay
from cluscomp_jax.config.training import DistillationConfig, TrainingConfig
from cluscomp_jax.errors import InputError

DOCUMENT, CONFIGS = ROOT / "docs" / "finetuning.md", ROOT / "configs" / "finetune"


def test_the_defaults_in_the_documentation_are_the_defaults() -> None:
    fields = tomllib.loads(re.search(r"```toml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)[1])
    for name, kind in (("data", DataConfig), ("training", TrainingConfig)):
        # TOML has no None, which is what compute_dtype is by default.
        assert fields[name].keys() == {field.name for field in dataclasses.fields(kind)} - {"compute_dtype"}
    assert fields["training"]["distillation"] == dataclasses.asdict(DistillationConfig())
    del fields["training"]["distillation"]
    assert overlay(FinetuneConfig(), fields) == FinetuneConfig()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_shipped_configs_load(path: Path) -> None:
    cfg = load_finetune_config(path)
    assert f"configs/finetune/{path.name}" in path.read_text().split("\n\n")[0]
    expected = {
        "recovery": ("cheap", False, 512),
        "distill": ("cheap", False, 512),
        "llama2_70b": ("all", True, 2048),
    }
    assert (cfg.training.remat_policy, cfg.training.offload_inputs, cfg.data.length) == expected[path.stem]


def test_what_a_file_says_is_read_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("seed = 3\n[training]\nlearning_rate = 1\ntrainable = ['a', 'b']\n[data]\ntoo_long = 'cut'\n")
    config = load_finetune_config(path)
    assert config.seed == 3
    assert config.training == TrainingConfig(learning_rate=1.0, trainable=("a", "b"))
    assert config.data == DataConfig(too_long="cut")
    assert overlay(FinetuneConfig(), config.to_dict()["finetune"]) == config


def test_a_table_turns_distillation_on(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[training.distillation]\ntemperature = 2\n")
    config = load_finetune_config(path)
    assert config.training.distillation == DistillationConfig(weight=1.0, temperature=2.0)
    assert overlay(FinetuneConfig(), config.to_dict()["finetune"]) == config


def test_the_mesh_is_read_and_is_no_part_of_what_the_run_is(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("mesh = {data = 2, tensor = 4}\n[training]\nbatch_size = 2\n")
    config = load_finetune_config(path)
    assert config.mesh == MeshConfig(data=2, tensor=4)
    assert (config.mesh.size, str(config.mesh)) == (8, "data=2,fsdp=1,tensor=4")
    assert config.to_dict() == dataclasses.replace(config, mesh=MeshConfig()).to_dict()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[trainings]", "key 'trainings' is not known; known here: data, training"),
        ("[training]\nlr = 1", "key 'training.lr' is not known"),
        ("[training]\nsteps = 1.5", "'training.steps' is 1.5; it must be int"),
        ("[training]\ntrainable = 'a'", "'training.trainable' is 'a'; it must be a list"),
        ("[data]\nlength = 1", "length is 1; it must be 2 or more"),
        ("[data]\ntoo_long = 'split'", "'data.too_long' is 'split'; it must be one of"),
        ("[training.distillation]\nweight = 2", "weight is 2.0; it must be a number from 0.0 to 1.0"),
        ("[training]\nremat_policy = 'some'", "'training.remat_policy' is 'some'"),
        ("result = 'first'", "'result' is 'first'"),
        ("mesh = {rows = 2}", "key 'mesh.rows' is not known; known here: data, fsdp, tensor"),
        ("mesh = {data = 0}", "mesh.data is 0; it must be 1 or more"),
        ("mesh = 8", "'mesh' is 8; it must be a table"),
        ("mesh = {data = 2, fsdp = 2}\n[training]\nbatch_size = 6", "choose a multiple of 4"),
        ("save_every = 0", "save_every is 0; it must be 1 or more"),
        ("seed = -1", "seed is -1"),
        ("model = 'llama'", "key 'model' is not known"),
        ("[data", "not valid TOML"),
    ],
)
def test_what_a_file_must_not_say_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(reason)) as raised:
        load_finetune_config(path)
    assert str(raised.value).startswith(f"config {path}: ")
