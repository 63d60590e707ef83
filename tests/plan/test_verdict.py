"""The arithmetic of a plan, the presets, and the command, with and without a compiler for cards."""

import dataclasses
import inspect
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from io_models import config_fields

from cluscomp_jax import cli, llama
from cluscomp_jax.cli.arguments import PlanArguments
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.data import CalibrationConfig, DataConfig
from cluscomp_jax.config.finetune import FinetuneConfig
from cluscomp_jax.config.mesh import MeshConfig
from cluscomp_jax.config.run import CompressConfig, load_config
from cluscomp_jax.config.training import DistillationConfig, TrainingConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.model import build_model, parameter_shapes
from cluscomp_jax.pipeline import compress
from cluscomp_jax.plan import PRESETS, Plan, Reserve, find_target, plan, preset_config
from cluscomp_jax.plan import target as target_module
from cluscomp_jax.plan.budget import forward_batch
from cluscomp_jax.plan.host import HostRequirements, host_needs
from cluscomp_jax.plan.program import Memory
from cluscomp_jax.plan.setting import layer_types_of
from cluscomp_jax.plan.shapes import AbstractDevice
from cluscomp_jax.plan.whole import finetuning_of
from cluscomp_jax.runtime.reporter import SilentReporter

GIB = 2**30
TINY = llama.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16,
)  # fmt: skip
BLIND = CompressConfig(
    model=TINY,
    cluster=ClusterConfig(rules=(CompressionRule(group_size=4, num_codes=16),), weighted=False, error_feedback=False),
    calibration=CalibrationConfig(samples=64, length=32),
    tuning=None,
)


def made(peaks: dict[str, int], usable: int) -> Plan:
    stages = {stage: Memory(stage, "program", peak - 6, 3, 2, 1) for stage, peak in peaks.items()}
    return Plan("card", 2 * usable, usable, stages, tuple(stages.values()), {}, {}, HostRequirements(1, 2, 3, 4))


def test_the_largest_stage_decides() -> None:
    fitting = made({"cluster": 2 * GIB, "tune": 5 * GIB}, 5 * GIB)
    assert fitting.peak.stage == "tune"
    assert fitting.fits
    assert fitting.advice() == []
    over = made({"cluster": 2 * GIB, "tune": 5 * GIB + GIB // 2}, 5 * GIB)
    assert not over.fits
    (line,) = over.advice()
    assert line.startswith("tune is 0.50 GiB too large: choose a smaller batch_size")
    fields = json.loads(json.dumps(over.to_dict()))
    assert fields["fits"] is False
    assert fields["stages"]["cluster"]["peak_bytes"] == 2 * GIB
    assert fields["stages"]["cluster"]["argument_bytes"] == 2 * GIB - 6
    assert fields["stages"]["cluster"]["temp_bytes"] == 2


def test_the_reserve_leaves_room_inside_and_outside_what_jax_may_take() -> None:
    assert Reserve(0.75, GIB).usable(48 * GIB) == 35 * GIB
    for wrong in ((0.0, 0), (1.1, 0), (0.5, -1)):
        with pytest.raises(InputError, match="it must be"):
            Reserve(*wrong)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-2-7b", 6.738), ("llama-2-13b", 13.016), ("llama-2-70b", 68.977), ("llama-3-8b", 8.030),
        ("llama-3-70b", 70.554), ("llama-3.1-405b", 405.853), ("mistral-7b", 7.248), ("qwen2.5-72b", 72.706),
        ("mixtral-8x7b", 46.703), ("qwen3-30b-a3b", 30.532),
        ("smollm3-3b", 3.075), ("granite-3.3-8b", 8.171), ("olmo-2-7b", 7.299), ("olmo-3-32b", 32.234),
        ("gemma-2-27b", 27.227), ("gemma-3-1b", 1.000), ("gemma-3-27b", 27.009), ("phi-3-mini", 3.821),
        ("phi-4", 14.660), ("ministral-3-8b", 8.490), ("seed-oss-36b", 36.151),
        ("opt-125m", 0.125), ("opt-350m", 0.331), ("opt-1.3b", 1.316), ("opt-2.7b", 2.652), ("opt-6.7b", 6.658),
        ("opt-13b", 12.853), ("opt-30b", 29.975), ("opt-66b", 65.720),
    ],
)  # fmt: skip
def test_a_preset_has_as_many_parameters_as_its_model(name: str, billions: float) -> None:
    shapes = parameter_shapes(build_model(preset_config(name)))
    assert sum(map(math.prod, shapes.values())) / 1e9 == pytest.approx(billions, abs=0.001)


def test_the_help_names_every_preset() -> None:
    text = re.search(r"or preset: (.*?)\"\"\"", inspect.getsource(PlanArguments), re.DOTALL)
    assert text is not None
    named = set()
    for entry in re.split(r",\s+", text[1]):
        first, *others = entry.split("/")
        named |= {first, *(f"{first.rpartition('-')[0]}-{other}" for other in others)}
    assert named == set(PRESETS)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(InputError, match="no preset is called 'llama-9'"):
        preset_config("llama-9")


@pytest.mark.long
def test_a_plan_compiles_for_any_device_jax_has() -> None:
    card = find_target("rtx4090")
    done = plan(BLIND, card, AbstractDevice(), context=32, reserve=Reserve(), reporter=SilentReporter())
    assert done.fits
    assert list(done.stages) == ["embed", "cluster", "propagate", "finetune", "evaluate", "generate"]
    assert all(memory.peak_bytes > 0 for memory in done.programs)
    assert done.usable_bytes == Reserve().usable(card.memory_bytes)
    assert done.hours.keys() == done.stages.keys() - {"generate"}
    assert done.launches == {}  # the programs are those of a CPU
    with pytest.raises(InputError, match="context is 33"):
        plan(BLIND, card, AbstractDevice(), context=33, reserve=Reserve(), reporter=SilentReporter())
    followed = FinetuneConfig(training=TrainingConfig(distillation=DistillationConfig()))
    taught = plan(
        BLIND, card, AbstractDevice(), context=32, reserve=Reserve(), reporter=SilentReporter(), finetune=followed
    )
    model = build_model(BLIND.model)
    shapes = [*parameter_shapes(model).values()]
    more = taught.stages["finetune"].peak_bytes - done.stages["finetune"].peak_bytes
    assert more >= 2 * sum(map(math.prod, shapes))  # the original in 16 bit


def test_the_host_holds_roots_while_compressing_and_the_whole_model_to_finetune() -> None:
    wide = dataclasses.replace(TINY, intermediate_size=4096)
    block = 2 * sum(math.prod(shape) for shape in build_model(wide).block_shapes(0).values())

    def needs(cfg: CompressConfig, training: TrainingConfig = TrainingConfig()) -> HostRequirements:
        model = build_model(cfg.model)
        finetune = FinetuneConfig(data=DataConfig(length=64), training=training)
        return host_needs(model, cfg, layer_types_of(model, cfg, AbstractDevice(), 1), finetune)

    blind = needs(dataclasses.replace(BLIND, model=wide))
    fed = needs(dataclasses.replace(BLIND, model=wide, cluster=ClusterConfig(rules=BLIND.cluster.rules)))
    root, kernel = 4 * 4096**2, 4 * 4096 * 32
    assert fed.host_bytes - blind.host_bytes == root + kernel - 2 * block
    shallow = needs(BLIND)
    deep = needs(dataclasses.replace(BLIND, model=dataclasses.replace(TINY, num_hidden_layers=200, layer_types=())))
    assert deep.host_bytes == shallow.host_bytes
    assert deep.finetune_host_bytes - shallow.finetune_host_bytes > deep.checkpoint_bytes - shallow.checkpoint_bytes
    offloaded = TrainingConfig(offload_inputs=True, batch_size=4096, compute_dtype="bfloat16")
    pinned = needs(BLIND, offloaded).finetune_host_bytes
    doubled = needs(BLIND, dataclasses.replace(offloaded, batch_size=8192)).finetune_host_bytes
    assert doubled - pinned == 2 * 2 * 4096 * 64 * 32  # blocks, bytes, rows, tokens, channels


@pytest.mark.long
def test_a_memory_budget_chooses_the_batch_or_says_what_does_not_fit() -> None:
    model, shape = build_model(TINY), (64, 32)
    tuned = CompressConfig(
        model=TINY, cluster=BLIND.cluster, calibration=BLIND.calibration, tuning=BlockTuningConfig(epochs=1)
    )
    assert forward_batch(model, tuned, shape) == 64
    batches = [
        forward_batch(model, dataclasses.replace(tuned, device_memory_gib=megabytes / 1024), shape)
        for megabytes in (2, 4, 64)
    ]
    assert batches == sorted(batches)
    assert batches[0] < batches[-1] == 64
    assert all(batch & (batch - 1) == 0 for batch in batches)
    with pytest.raises(InputError, match=r"device_memory_gib is 1e-05; \w+ \(.*\) takes"):
        forward_batch(model, dataclasses.replace(tuned, device_memory_gib=1e-5), shape)


def test_a_memory_budget_that_is_too_small_is_refused_before_sensitivities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluscomp_jax.compression_run.sensitivities", None)
    cluster = ClusterConfig(bits=3.0, mixed_precision="per_matrix", iterations=1)
    cfg = CompressConfig(model=TINY, cluster=cluster, device_memory_gib=1e-5)
    with pytest.raises(InputError, match="device_memory_gib is 1e-05"):
        compress(
            llama.init_params(TINY, jax.random.key(0)), cfg, calibration=np.ones((64, 32), np.int32), work_dir=tmp_path
        )


def test_the_budget_is_a_key_of_the_config(tmp_path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("device_memory_gib = 40\n")
    assert load_config(path).device_memory_gib == 40.0
    path.write_text("device_memory_gib = 0\n")
    with pytest.raises(InputError, match="device_memory_gib is 0"):
        load_config(path)


def test_rows_and_dtype_of_finetuning_are_those_of_the_run_unless_told() -> None:
    tuned = dataclasses.replace(BLIND, tuning=BlockTuningConfig(compute_dtype="bfloat16"))
    planned = finetuning_of(tuned)
    assert (planned.data.length, planned.training.compute_dtype) == (32, "bfloat16")
    assert finetuning_of(BLIND).training.compute_dtype is None
    assert finetuning_of(BLIND).training.batch_size == 1
    assert finetuning_of(BLIND, MeshConfig(data=2, fsdp=4, tensor=2)).training.batch_size == 8


@pytest.fixture
def any_device(monkeypatch) -> None:
    """`cluscomp plan` compiles for the CPU, where no compiler for cards is installed."""
    monkeypatch.setattr("cluscomp_jax.cli.plan.placement", lambda target: None)


@pytest.fixture
def blind_run(tmp_path) -> list[str]:
    """The line that plans a small run without its last options."""
    (tmp_path / "config.json").write_text(json.dumps(config_fields()))
    settings = tmp_path / "run.toml"
    settings.write_text(
        "tuning = false\n[cluster]\nweighted = false\nerror_feedback = false\n[calibration]\nsamples = 2\nlength = 8"
    )
    return ["plan", str(tmp_path / "config.json"), "--target", "a6000", "--config", str(settings), "--context", "32"]


CPU_PLAN = """
import sys
from cluscomp_jax import cli
import cluscomp_jax.cli.plan as command
command.placement = lambda target: None
raise SystemExit(cli.main(sys.argv[1:]))
"""


@pytest.mark.long
def test_the_command_leaves_the_persistent_compilation_cache_alone(tmp_path, blind_run) -> None:
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-c", CPU_PLAN, *blind_run]
    done = subprocess.run(command, env=os.environ | cache, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("cache/*"))


def test_the_command_says_no_with_exit_code_1_and_json_on_its_last_line(
    tmp_path, capsys, any_device, blind_run
) -> None:
    assert cli.main([*blind_run, "--json"]) == 0
    out = capsys.readouterr().out
    fields = json.loads(out.splitlines()[-1])
    assert fields["fits"] is True
    assert {"cluster", "finetune", "evaluate", "generate"} <= fields["stages"].keys()
    assert "fits a6000: at most" in out
    finetune = tmp_path / "finetune.toml"
    finetune.write_text("[data]\nlength = 4096\n[training]\nbatch_size = 64\n")
    assert cli.main([*blind_run, "--json", "--finetune-config", str(finetune)]) == 0
    larger = json.loads(capsys.readouterr().out.splitlines()[-1])["stages"]
    assert larger.pop("finetune")["peak_bytes"] > fields["stages"].pop("finetune")["peak_bytes"]
    assert larger == fields["stages"]
    assert cli.main([*blind_run, "--memory-fraction", "0.001"]) == 1
    assert "does NOT fit a6000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama-2-70", "--target", "a6000"], "neither a folder, a config.json nor a preset"),
        (["llama-2-7b", "--target", "b6000"], "target 'b6000' is neither one of"),
        (["missing.json", "--target", "a6000"], "missing.json"),
        (["llama-2-7b", "--target", "a6000", "--config", "missing.toml"], "config missing.toml"),
        (["llama-2-7b", "--target", "a6000", "--finetune-config", "missing.toml"], "config missing.toml"),
        (["llama-2-7b", "--target", "a6000", "--mesh", "rows=2"], "key 'rows' is not known; known here: data, fsdp"),
        (["llama-2-7b", "--target", "a6000", "--memory-fraction", "2"], "memory fraction is 2.0"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_command_names_the_extra_where_the_compiler_is_missing(capsys, monkeypatch) -> None:
    def missing(**_):
        raise NotImplementedError

    monkeypatch.setattr(target_module.topologies, "get_topology_desc", missing)
    assert cli.main(["plan", "llama-2-7b", "--target", "a6000"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'pip install "cluscomp-jax[aot]"' in line
