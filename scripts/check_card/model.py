"""A small real model through the whole pipeline, next to the CPU; then one block of Llama-2-7B's shape, measured."""

import dataclasses
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import cluscomp_jax
from check_card.generation import LLAMA_2_7B, TINY
from check_card.step import Step
from cluscomp_jax import data
from cluscomp_jax.clustering.summary import CompressionSummary
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.data import CalibrationConfig
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.core import trees
from cluscomp_jax.evaluation.perplexity import perplexity
from cluscomp_jax.inference.decoder import generate
from cluscomp_jax.io.hf.safetensors_source import SafetensorsSource, read_config
from cluscomp_jax.models.llama.init import initial_value
from cluscomp_jax.models.model import Model, build_model, parameter_shapes, parse_model_config
from cluscomp_jax.models.source import DictSink, DictSource
from cluscomp_jax.pipeline import compress_stream
from cluscomp_jax.plan.program import Memory, compile_program
from cluscomp_jax.plan.setting import layer_types_of
from cluscomp_jax.plan.shapes import AbstractDevice
from cluscomp_jax.plan.stages import PER_BLOCK, largest_alike

FIXTURE = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "tiny_llama"
_SOME = r"model/layers/\d+/(self_attn/[qo]_proj|mlp/(gate|up)_proj)/kernel"
"""Matrices of two shapes, which are fewer programs to compile than all."""
_FEW = r"model/layers/\d+/self_attn/[qo]_proj/kernel"
_ALL = r"model/layers/\d+/(self_attn/[qkvo]_proj|mlp/(gate|up|down)_proj)/kernel"
_ATTENTION = r"model/layers/\d+/self_attn/[qkvo]_proj/kernel"
_NEAR = 0.01
"""How far perplexities of two devices may be apart, relative: a GPU rounds the factors of products to fewer bits."""
_COMPILING = 40.0
"""Seconds that are set apart for compiling the programs of a block."""


def run(step: Step) -> None:
    """Runs both, the small model first."""
    try:
        _small_model(step)
    except Exception as error:  # whatever it is, the block is worth trying
        step.fact("small model", right=False, failed=f"{type(error).__name__}: {error}"[:500])
    if step.remaining < 20 and not step.dry:
        why = f"{step.remaining:.0f} s are left of the step's limit"
        step.fact("left out", what="the block of Llama-2-7B", why=why)
        return
    _block(step)


def _text(name: str, characters: int) -> np.ndarray:
    """Returns the first tokens of a shipped text, int32 [t]."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(FIXTURE / "tokenizer.json"))
    return np.asarray(tokenizer.encode(data.text(name)[:characters]).ids, np.int32)


def _small_model(step: Step) -> None:
    """Compresses tests/fixtures/tiny_llama here; compares perplexity and tokens of the result with the CPU's."""
    samples, length, scored = (2, 16, 64) if step.dry else (8, 128, 4096)
    config = read_config(FIXTURE)
    source = SafetensorsSource(FIXTURE, build_model(config))
    tokens = _text("wiki_train", 60_000)[: samples * length].reshape(samples, length)
    held_out = _text("wiki_test", 60_000)[:scored]
    cfg = CompressConfig(
        model=config,
        cluster=ClusterConfig(
            rules=(CompressionRule(pattern=_FEW if step.dry else _SOME, num_codes=16 if step.dry else 256),),
            iterations=1 if step.dry else 10,
            refine_rounds=1,
            true_sequential=not step.dry,
            drift_correction=not step.dry,
        ),
        calibration=CalibrationConfig(samples=samples, length=length),
        tuning=BlockTuningConfig(epochs=1),
    )
    began = time.perf_counter()
    compressed = cluscomp_jax.compress(source, cfg, calibration=tokens)
    size = cluscomp_jax.size_report(compressed)
    step.fact("small model compressed", seconds=time.perf_counter() - began, bits_per_weight=size.bits_per_weight)
    context = min(length, 128)
    here = perplexity(compressed, held_out, config, context=context)
    dense = perplexity(source, held_out, config, context=context).perplexity
    with jax.default_device(jax.devices("cpu")[0]):
        there = perplexity(compressed, held_out, config, context=context)
    apart = abs(here.perplexity / there.perplexity - 1)
    step.fact(
        "perplexity of the small model",
        right=apart <= _NEAR,
        device=here.perplexity,
        cpu=there.perplexity,
        apart=apart,
        limit=_NEAR,
        original=dense,
        tokens=here.tokens,
        context=context,
    )
    _same_tokens(step, compressed, config, held_out[:8] if step.dry else held_out[:32])


def _same_tokens(step: Step, params: Any, config: Any, prompt: np.ndarray) -> None:
    """Tells whether this device and the CPU generate the same tokens; a near tie may part them, so none is wrong."""
    new = 3 if step.dry else 16
    for decode_weights in ("call",) if step.dry else ("call", "once"):
        options: dict[str, Any] = {"max_new_tokens": new, "decode_weights": decode_weights}
        here = generate(params, prompt, config, **options).tolist()
        with jax.default_device(jax.devices("cpu")[0]):
            there = generate(params, prompt, config, **options).tolist()
        alike = sum(a == b for a, b in zip(here, there, strict=True))
        step.fact(
            "greedy tokens", equal=here == there, alike=alike, decode_weights=decode_weights, device=here, cpu=there
        )


class _Progress:
    """A Reporter that records times of matrices and tuning steps at once, so that a run that is cut off has them."""

    def __init__(self, step: Step):
        self._step, self._last, self._times = step, time.perf_counter(), list[float]()
        self._stage, self._total = "", 0

    def start(self, stage: str, total: int, unit: str) -> None:
        """A stage begins."""
        self._last, self._times, self._stage, self._total = time.perf_counter(), [], stage, total

    def advance(self, steps: int = 1, note: str = "") -> None:
        """A step of the stage is done."""
        now = time.perf_counter()
        took, self._last = now - self._last, now
        self._times.append(took)
        if note:
            self._step.fact(self._stage, matrix=note, seconds=took)
        elif len(self._times) == self._total:
            median = statistics.median(self._times)
            self._step.fact(self._stage, steps=self._total, first_seconds=self._times[0], median_seconds=median)

    def record(self, event: str, **fields: Any) -> None:
        """A measurement is finished; its numbers are recorded."""
        numbers = {name: value for name, value in fields.items() if isinstance(value, int | float)}
        self._step.fact(f"record of the {event}", **numbers)

    def warn(self, text: str) -> None:
        """Tells a warning."""
        self._step.fact("warning", text=text)


def _block(step: Step) -> None:
    """Compresses one block by the default recipe; records seconds by stage, and memory next to the plan's."""
    model = build_model(parse_model_config({**(TINY if step.dry else LLAMA_2_7B), "num_hidden_layers": 1, **_VOCAB}))
    cfg, why = _sized(step, model)
    step.fact("settings of the block", cluster=dataclasses.asdict(cfg.cluster), why=why)
    calibration = np.random.default_rng(0).integers(
        0, model.config.vocab_size, (cfg.calibration.samples, cfg.calibration.length), np.int32
    )
    source = DictSource(_random_params(model), model)
    device = jax.devices()[0]
    before = (device.memory_stats() or {}).get("peak_bytes_in_use")
    with tempfile.TemporaryDirectory(prefix="cluscomp-") as work:
        began = time.perf_counter()
        summary: CompressionSummary = compress_stream(
            source, DictSink(), cfg, calibration=calibration, work_dir=Path(work), reporter=_Progress(step)
        )
        seconds = time.perf_counter() - began
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    step.fact("stages of the block", **{name: stage["seconds"] for name, stage in summary.stages.items()})
    step.fact(
        "block",
        seconds=seconds,
        bits_per_weight=summary.bits_per_weight,
        relative_errors={matrix["path"]: matrix["relative_error"] for matrix in summary.matrices},
        peak_device_bytes=peak,
        peak_device_bytes_before=before,
    )
    _plan(step, model, cfg, peak)


_VOCAB = {"vocab_size": 2048}
"""Of the one-block model, in place of 32,000: its embeddings are not measured."""


def _sized(step: Step, model: Model) -> tuple[CompressConfig, str]:
    """Returns the default recipe, cut down to the time that is left by what the step before measured, and why."""
    samples, length = (2, 16) if step.dry else (8, 2048)
    codes = 16 if step.dry else 65500
    shapes = model.block_shapes(0)
    kernels = {path: shapes[path] for paths in model.input_groups.values() for path in paths}
    choices = [(_ALL, 3, 20), (_ALL, 1, 10), (_ALL, 1, 4), (_ALL, 0, 4), (_ATTENTION, 1, 4), (_ATTENTION, 0, 4)]
    known = [
        step.known("kmeans", "error feedback"),
        step.known("kmeans", "one refine round"),
        step.known("kmeans", "k-means, warm"),
    ]
    chosen, why = choices[2], "nothing was measured before"
    if all(known) and not step.dry:
        fed, refined, fitted = known
        assert fed is not None
        assert refined is not None
        assert fitted is not None
        for chosen in choices:
            matrices = [shape for path, shape in kernels.items() if chosen[0] == _ALL or path.startswith("self_attn")]
            channels = sum(shape[0] for shape in matrices)
            weights = sum(a * b for a, b in matrices)
            needed = channels * (fed["seconds_per_channel"] + chosen[1] * refined["seconds_per_channel"])
            needed += weights / 4 * chosen[2] * fitted["seconds_per_vector_and_iteration"]
            why = f"{needed:.0f} s foreseen, {step.remaining:.0f} s left, {_COMPILING:.0f} s of them for compiling"
            if needed + _COMPILING < step.remaining:
                break
    pattern, refine_rounds, iterations = choices[-1] if step.dry else chosen
    rule = CompressionRule(pattern=pattern, num_codes=codes)
    cfg = CompressConfig(
        model=model.config,
        cluster=ClusterConfig(rules=(rule,), refine_rounds=refine_rounds, iterations=1 if step.dry else iterations),
        calibration=CalibrationConfig(samples=samples, length=length),
        tuning=BlockTuningConfig(epochs=1),
    )
    return cfg, why


def _random_params(model: Model) -> dict[str, Any]:
    """Returns random parameters in bfloat16, on the host."""
    flat = {}
    for number, (path, shape) in enumerate(parameter_shapes(model).items()):
        value = initial_value(path.rpartition("/")[2], shape, jax.random.key(number), 0.02)
        flat[path] = jax.device_get(value.astype(jnp.bfloat16))
    return trees.unflatten(flat)


def _plan(step: Step, model: Model, cfg: CompressConfig, peak: int | None) -> None:
    """Compiles the programs of the plan for this device, those that hold most first, and records their memory."""
    settings = layer_types_of(model, cfg, AbstractDevice(), 1)
    stages_of_a_block = PER_BLOCK[-1:] if step.dry else PER_BLOCK
    programs = largest_alike(
        program for setting in settings for stage in stages_of_a_block for program in stage(setting)
    )
    programs.sort(key=lambda program: -program.live_bytes)
    stages: dict[str, Memory] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for future in as_completed([pool.submit(compile_program, program) for program in programs]):
            memory = future.result()
            step.fact("planned program", stage=memory.stage, program=memory.name, bytes=memory.peak_bytes)
            if memory.stage not in stages or memory.peak_bytes > stages[memory.stage].peak_bytes:
                stages[memory.stage] = memory
    largest = max(stages.values(), key=lambda memory: memory.peak_bytes)
    step.fact(
        "plan and device",
        compared="largest program of the plan, compiled for this device, with the peak that its allocator counted "
        "in this process, compilation and the small model included",
        planned_bytes=largest.peak_bytes,
        planned_in=f"{largest.stage}: {largest.name}",
        peak_device_bytes=peak,
        peak_over_planned=peak / largest.peak_bytes if peak else None,
        programs=len(programs),
        by_stage={name: memory.peak_bytes for name, memory in stages.items()},
    )
