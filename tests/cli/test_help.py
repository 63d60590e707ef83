"""Every option's help states its default, and this is the default of the settings that decide."""

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from cluscomp_jax.cli import arguments, main
from cluscomp_jax.config.finetune import FinetuneConfig
from cluscomp_jax.config.numerics import compute_dtype_of
from cluscomp_jax.config.run import RECIPES
from cluscomp_jax.evaluation.exact_match import GSM8K_ANSWER
from cluscomp_jax.evaluation.perplexity import perplexity
from cluscomp_jax.export import FORMATS, ExportFormat
from cluscomp_jax.export.format import DEFAULT_SHARD_BYTES
from cluscomp_jax.inference.sampling import Sampling
from cluscomp_jax.plan.target import shipped_targets
from cluscomp_jax.plan.whole import GIB, Reserve

RUN, FINETUNE = RECIPES["default"], FinetuneConfig()
RULE, CLUSTER, TRAINING = RUN.cluster.rules[0], RUN.cluster, FINETUNE.training
COMMANDS = {
    typing.get_args(branch)[1].name: typing.get_args(branch)[0] for branch in typing.get_args(arguments.AnyCommand)
}

RECIPE: dict[str, Any] = {
    "samples": RUN.calibration.samples,
    "length": RUN.calibration.length,
    "sample_offsets": RUN.calibration.sample_offsets,
    "begin_windows": RUN.calibration.begin_windows,
    "bits": CLUSTER.bits,
    "mixed_precision": CLUSTER.mixed_precision,
    "coding": CLUSTER.coding,
    "tie_codebooks": CLUSTER.tie_codebooks,
    "export": CLUSTER.export,
    "g": RULE.group_size,
    "num_codes": RULE.num_codes,
    "step_bits": RULE.step_bits,
    "axis": RULE.axis,
    "unweighted": not CLUSTER.weighted,
    "no_tuning": RUN.tuning is None,
    "epochs": RUN.tuning and RUN.tuning.epochs,
    "learning_rate": RUN.tuning and RUN.tuning.learning_rate,
    "recover": 0 if RUN.recovery is None else RUN.recovery.steps,
    "seed": RUN.seed,
    "mesh": f"data={RUN.mesh.data}",
}
CONFIG: dict[str, Any] = {
    "steps": TRAINING.steps,
    "length": FINETUNE.data.length,
    "batch_size": TRAINING.batch_size,
    "grad_accumulation_steps": TRAINING.grad_accumulation_steps,
    "learning_rate": TRAINING.learning_rate,
    "trainable": " ".join(TRAINING.trainable),
    "responses_only": FINETUNE.data.responses_only,
    "too_long": FINETUNE.data.too_long,
    "unusable": FINETUNE.data.unusable,
    "dtype": f"{compute_dtype_of(TRAINING, 'gpu')} on a GPU, else {compute_dtype_of(TRAINING, 'cpu')}",
    "seed": FINETUNE.seed,
    "evaluate_every": FINETUNE.evaluate_every,
    "result": FINETUNE.result,
    "save_every": FINETUNE.save_every,
    "mesh": str(FINETUNE.mesh),
}
STATED = {("compress", name): f"{value}, from the recipe" for name, value in RECIPE.items()}
STATED |= {("finetune", name): f"{value}, or from --config" for name, value in CONFIG.items()}
IN_WORDS = {
    ("compress", "sample_offsets"): "drawn by --seed, from the recipe",
    ("compress", "bits"): "no budget, from the recipe",
    ("compress", "step_bits"): "plain index, from the recipe",
    ("finetune", "evaluate_every"): "none but before and after, or from --config",
}
"""What a setting of None means."""


def default_of(function: Any, name: str) -> Any:
    return inspect.signature(function).parameters[name].default


ELSEWHERE = {
    ("evaluate", "batch_size"): default_of(perplexity, "batch_size"),
    ("evaluate", "dtype"): default_of(perplexity, "dtype"),
    ("generate", "temperature"): Sampling().temperature,
    ("generate", "repetition_penalty"): Sampling().repetition_penalty,
    ("plan", "memory_fraction"): Reserve().fraction,
    ("plan", "reserve_gib"): Reserve().bytes / GIB,
}
"""Defaults that a command's dataclass and the library have each."""


def help_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str) -> dict[str, str]:
    """Returns {flag: its help on one line} of a command."""
    monkeypatch.setenv("COLUMNS", "500")
    assert main([command, "--help"]) == 0
    found: dict[str, str] = {}
    flag = ""
    for line in capsys.readouterr().out.splitlines():
        text = line.strip("│ ")  # tyro draws boxes where the stream's encoding has them
        if begun := re.match(r"[│ ] (--?\w[\w-]*|MODEL)\b", line):
            flag = begun[1]
            found[flag] = text
        elif flag and re.match(r"[│ ] {2,}\S", line):
            found[flag] += f" {text}"
    return found


def options() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    for command, fields in COMMANDS.items():
        for field in dataclasses.fields(fields):
            if field.name not in ("model", "models"):
                yield command, field


def flag_of(command: str, name: str) -> str:
    return "--for" if (command, name) == ("compress", "export") else f"--{name.replace('_', '-')}"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_option_states_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    shown = help_of(capsys, monkeypatch, command)
    fields = {flag_of(command, field.name): field for owner, field in options() if owner == command}
    assert shown.keys() - {"-h", "MODEL"} == fields.keys()
    for flag, field in fields.items():
        line = shown[flag]
        assert "None" not in line
        if field.default is dataclasses.MISSING:
            assert line.endswith("(required)")
            continue
        (stated,) = re.findall(r"\(default: (.*?)\)$", line)
        assert line.count("default:") == 1
        decided = re.search(r", (from the recipe|or from --config)$", stated)
        key = (command, field.name)
        assert bool(decided) == (key in STATED), f"{flag} {stated}"
        if key in STATED:
            assert stated == IN_WORDS.get(key, STATED[key]), flag
        elif field.default not in (None, ()):
            assert stated == str(field.default), flag


def test_words_are_for_settings_of_none_alone() -> None:
    assert all(STATED[key].startswith("None, ") for key in IN_WORDS)
    assert {key for key, stated in STATED.items() if stated.startswith("None, ")} == IN_WORDS.keys()


def test_defaults_of_commands_are_those_of_the_library() -> None:
    defaults = {(command, field.name): field.default for command, field in options()}
    assert {key: defaults[key] for key in ELSEWHERE} == ELSEWHERE
    assert arguments.DEFAULT_SHARD_GB * 1e9 == DEFAULT_SHARD_BYTES
    assert GSM8K_ANSWER.startswith("####")
    assert (Sampling().top_k, Sampling().top_p, Sampling().min_p) == (None, None, None)


def test_the_command_line_names_the_export_formats_there_are() -> None:
    named = typing.get_type_hints(arguments.ExportArguments)["format"]
    assert set(typing.get_args(named)) == set(typing.get_args(ExportFormat)) == FORMATS.keys()


def test_help_states_the_constants_of_commands_and_the_cards_there_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"(default: {arguments.DEFAULT_CONTEXT})" in help_of(capsys, monkeypatch, "compress")["--context"]
    evaluate = help_of(capsys, monkeypatch, "evaluate")
    assert f"(default: {arguments.DEFAULT_ANSWER_TOKENS})" in evaluate["--max-new-tokens"]
    cards = help_of(capsys, monkeypatch, "plan")["--target"].partition("card: ")[2].partition(", or a .txtpb")[0]
    assert sorted(cards.split(", ")) == sorted(shipped_targets())
