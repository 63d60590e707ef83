"""The plan's list of programs, held against what a run really compiles and what it then holds."""

import dataclasses
import gc
import logging
import math
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cluscomp_jax import compression_run, finetuning, llama, pipeline
from cluscomp_jax.clustering.code_search import NearestCodes
from cluscomp_jax.clustering.sensitivity import sensitivities
from cluscomp_jax.clustering.walk import Rows
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.data import CalibrationConfig, DataConfig
from cluscomp_jax.config.finetune import FinetuneConfig
from cluscomp_jax.config.recovery import RecoveryConfig
from cluscomp_jax.config.run import PAPER as RECIPE
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.config.training import TrainingConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.core.sensitivities import Sensitivities
from cluscomp_jax.evaluation import perplexity
from cluscomp_jax.models.model import build_model
from cluscomp_jax.models.source import DictSink, as_source
from cluscomp_jax.plan.program import Program
from cluscomp_jax.plan.setting import layer_types_of
from cluscomp_jax.plan.shapes import AbstractDevice
from cluscomp_jax.plan.stages import largest_alike, whole_run
from cluscomp_jax.plan.work import count_work
from cluscomp_jax.recovery import recover_stream
from cluscomp_jax.runtime.reporter import SilentReporter
from cluscomp_jax.text.token_rows import TokenRows

CONFIG = llama.LlamaConfig(
    vocab_size=67, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, initializer_range=0.3,
)  # fmt: skip
TUNING = BlockTuningConfig(epochs=1, compute_dtype="bfloat16", activation_dtype="bfloat16")
RULES = (CompressionRule(group_size=2, num_codes=300),)
CALIBRATION = CalibrationConfig(samples=2, length=24)
DEFAULT = CompressConfig(
    model=CONFIG,
    cluster=ClusterConfig(rules=RULES, iterations=2),
    calibration=CALIBRATION,
    tuning=TUNING,
)
UNCORRECTED = dataclasses.replace(DEFAULT, cluster=dataclasses.replace(DEFAULT.cluster, drift_correction=False))
SHARED = dataclasses.replace(
    DEFAULT,
    cluster=ClusterConfig(rules=(CompressionRule(group_size=4, num_codes=300),), iterations=2, tie_codebooks="block"),
)
SHARED_BLINDLY = dataclasses.replace(
    DEFAULT, cluster=dataclasses.replace(DEFAULT.cluster, tie_codebooks="input", error_feedback=False)
)
PAPER = CompressConfig(
    model=CONFIG,
    cluster=dataclasses.replace(RECIPE.cluster, rules=RULES, iterations=2),
    calibration=CALIBRATION,
    tuning=TUNING,
)
TRELLIS = dataclasses.replace(
    DEFAULT,
    cluster=ClusterConfig(rules=(CompressionRule(group_size=2, num_codes=256, step_bits=4),), iterations=2),
)
TRELLIS_BLIND = dataclasses.replace(
    TRELLIS, cluster=dataclasses.replace(TRELLIS.cluster, weighted=False, error_feedback=False)
)
TRELLIS_BY_SENSITIVITY = dataclasses.replace(
    TRELLIS, cluster=ClusterConfig(bits=4.4, coding="trellis", mixed_precision="per_matrix", iterations=2)
)
TOKENS = np.random.default_rng(0).integers(0, 67, (2, 24))
AFTERWARDS = ("finetune", "evaluate", "generate")
"""Stages that no compression runs."""
SLACK = 10_000
"""Bytes of keys, scalars and the like, and of results that are about to be let go of."""


class Compilations(logging.Handler):
    """Keeps (name, argument shapes, bytes of all arrays alive) of every program that JAX says it compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[str], int]] = []

    def emit(self, record: logging.LogRecord) -> None:
        found = re.match(r"Compiling jit\((.*?)\) with global shapes and types \((.*)\)\. Arg", record.getMessage())
        if found:
            shapes = re.findall(r"\w+\[[\d,]*\]", found[2])
            self.seen.append((found[1], shapes, bytes_alive()))


def bytes_alive() -> int:
    """Bytes of all arrays alive, each buffer once: what was fetched to the host is the same buffer on a CPU."""
    buffers = {}
    for array in jax.live_arrays():
        key = jnp.issubdtype(array.dtype, jax.dtypes.extended)
        buffers[id(array) if key else array.unsafe_buffer_pointer()] = array.nbytes
    return sum(buffers.values())


@pytest.fixture
def compilations() -> Iterator[Compilations]:
    logger, handler = logging.getLogger("jax._src.interpreters.pxla"), Compilations()
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    jax.clear_caches()
    with jax.log_compiles():
        yield handler
    logger.propagate = propagate
    logger.removeHandler(handler)


def planned(cfg: CompressConfig, finetune: FinetuneConfig) -> list[Program]:
    settings = layer_types_of(build_model(CONFIG), cfg, AbstractDevice(), batch=1)
    return list(whole_run(settings, context=32, finetune=finetune))


def shapes_of(program: Program) -> list[str]:
    return [f"{aval.dtype}[{','.join(map(str, aval.shape))}]" for aval in jax.tree.leaves(program.traced.in_avals)]


def size_of(shape: str) -> int:
    dtype, sides = re.fullmatch(r"(\w+)\[([\d,]*)\]", shape).groups()
    width = 1 if dtype == "bool" else int(re.search(r"\d+$", dtype)[0]) // 8 if dtype[-1].isdigit() else 8
    return width * math.prod(int(side) for side in sides.split(",") if side)


def contains(whole: list[str], part: list[str]) -> bool:
    """Whether `part` is `whole` less arguments that the program does not read."""
    left = list(whole)
    for shape in part:
        if shape not in left:
            return False
        left.remove(shape)
    return True


@pytest.mark.parametrize(
    "cfg",
    [
        pytest.param(DEFAULT, id="default"),
        pytest.param(UNCORRECTED, id="uncorrected", marks=pytest.mark.long),
        pytest.param(PAPER, id="paper", marks=pytest.mark.long),
        pytest.param(TRELLIS, id="trellis", marks=pytest.mark.long),
        pytest.param(TRELLIS_BLIND, id="trellis, blind", marks=pytest.mark.long),
        pytest.param(SHARED, id="shared", marks=pytest.mark.long),
        pytest.param(SHARED_BLINDLY, id="shared blindly", marks=pytest.mark.long),
    ],
)
def test_a_run_compiles_what_the_plan_lists_and_holds_what_it_says(cfg, compilations, monkeypatch) -> None:
    monkeypatch.setattr(compression_run, "forward_batch", lambda *_: 1)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), llama.init_params(CONFIG, jax.random.key(0)))
    gc.collect()  # arrays that earlier tests left in cycles would otherwise vanish in the middle of the run
    before = bytes_alive()
    compilations.seen.clear()
    pipeline.compress(params, cfg, calibration=TOKENS)
    programs = planned(cfg, FinetuneConfig())
    hold_to([p for p in programs if p.stage not in AFTERWARDS], compilations.seen, before)


@pytest.mark.long
def test_codes_of_weighted_outputs_compile_what_the_plan_lists(compilations, monkeypatch) -> None:
    """Sensitivities at which bits are spent evenly, as a plan has them, which are not measured here."""
    cfg = TRELLIS_BY_SENSITIVITY
    shapes = {
        f"model/layers/{i}/{path}": shape
        for i in range(CONFIG.num_hidden_layers)
        for path, shape in build_model(CONFIG).block_shapes(i).items()
        if path.endswith("_proj/kernel")
    }
    even = Sensitivities(
        {path: float(math.prod(shape)) for path, shape in shapes.items()},
        {path: np.arange(shape[1], dtype=np.float32) for path, shape in shapes.items()},
    )
    monkeypatch.setattr(compression_run, "sensitivities", lambda *_, **__: even)
    monkeypatch.setattr(compression_run, "forward_batch", lambda *_: 1)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), llama.init_params(CONFIG, jax.random.key(0)))
    gc.collect()
    before = bytes_alive()
    compilations.seen.clear()
    pipeline.compress(params, cfg, calibration=TOKENS)
    programs = planned(cfg, FinetuneConfig())
    hold_to([p for p in programs if p.stage not in (*AFTERWARDS, "sensitivity")], compilations.seen, before)
    assert any(name == "to_places" for name, *_ in compilations.seen)


@pytest.mark.long
def test_measuring_sensitivities_compiles_what_the_plan_lists_and_holds_what_it_says(compilations, tmp_path) -> None:
    cfg = dataclasses.replace(DEFAULT, cluster=ClusterConfig(bits=4.4))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), llama.init_params(CONFIG, jax.random.key(0)))
    model = build_model(CONFIG)
    gc.collect()
    before = bytes_alive()
    compilations.seen.clear()
    source = as_source(params, model)
    sensitivities(model, source, TOKENS, settings=cfg.cluster, work_dir=tmp_path, reporter=SilentReporter())
    programs = [p for p in planned(cfg, FinetuneConfig()) if p.stage == "sensitivity"]
    slopes = TOKENS.size * CONFIG.hidden_size * 4
    hold_to(programs, compilations.seen, before, later={"head_slope": slopes})
    assert not any(p.stage == "sensitivity" for p in planned(DEFAULT, FinetuneConfig()))


@pytest.mark.long
def test_finetuning_compiles_what_the_plan_lists_and_holds_what_it_says(compilations) -> None:
    training = TrainingConfig(steps=2, grad_accumulation_steps=2, compute_dtype="bfloat16")
    cfg = FinetuneConfig(model=CONFIG, data=DataConfig(length=24), training=training)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), llama.init_params(CONFIG, jax.random.key(0)))
    blind = dataclasses.replace(PAPER, tuning=None)
    compressed = pipeline.compress(params, blind)
    rows = np.random.default_rng(1).integers(0, 67, (4, 24), dtype=np.int32)
    jax.clear_caches()
    gc.collect()
    before = bytes_alive()
    compilations.seen.clear()
    finetuning.finetune(compressed, rows, cfg, evaluation=TokenRows(rows[:1], np.ones((1, 24), bool)))
    hold_to([p for p in planned(blind, cfg) if p.stage == "finetune"], compilations.seen, before)


@pytest.mark.long
def test_recovery_compiles_what_the_plan_lists_and_holds_what_it_says(compilations) -> None:
    cfg = dataclasses.replace(PAPER, tuning=None, recovery=RecoveryConfig(steps=2, compute_dtype="bfloat16"))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), llama.init_params(CONFIG, jax.random.key(0)))
    source = as_source(params, build_model(CONFIG))
    compressed = as_source(pipeline.compress(params, dataclasses.replace(cfg, recovery=None)), build_model(CONFIG))
    jax.clear_caches()
    gc.collect()
    before = bytes_alive()
    compilations.seen.clear()
    recover_stream(compressed, source, DictSink(), cfg, TOKENS, bits=2.0)
    hold_to([p for p in planned(cfg, FinetuneConfig()) if p.stage == "recover"], compilations.seen, before)


@pytest.mark.long
def test_evaluation_compiles_what_the_plan_lists_and_holds_what_it_says(compilations) -> None:
    params = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), llama.init_params(CONFIG, jax.random.key(0)))
    blind = dataclasses.replace(PAPER, tuning=None)
    compressed = jax.tree.map(np.asarray, pipeline.compress(params, blind))
    jax.clear_caches()
    gc.collect()
    before = bytes_alive()
    compilations.seen.clear()
    length = CALIBRATION.length
    perplexity.perplexity(compressed, TOKENS.reshape(-1), CONFIG, context=length)
    programs = [p for p in planned(blind, FinetuneConfig()) if p.stage == "evaluate"]
    seen = [entry for entry in compilations.seen if entry[0] != "run_embed"]  # the plan has it in another stage
    hold_to(programs, seen, before)


def hold_to(
    programs: list[Program], seen: list[tuple[str, list[str], int]], before: int, later: dict[str, int] | None = None
) -> None:
    """Asserts that these programs and no others were compiled, and that what was alive then is what they say.

    Args:
      seen: of `Compilations`.
      before: bytes alive before the run.
      later: {function: bytes of its own earlier results that its calls hold, the first of which has none}.
    """
    largest = max(program.live_bytes for program in programs)
    names = {program.traced.fun_name for program in programs}
    excess: dict[str, float] = {}
    met: set[tuple[str, str]] = set()
    for name, shapes, alive in seen:
        alike = [p for p in programs if p.traced.fun_name == name and contains(shapes_of(p), shapes)]
        met |= {(program.stage, program.name) for program in alike}
        if alike:
            at_last = alive - before + (later or {}).get(name, 0)
            spare = min(program.live_bytes for program in alike) - 1.15 * at_last
            excess[name] = min(excess.get(name, spare), spare)
            assert at_last <= max(program.live_bytes for program in alike) + SLACK, (name, shapes)
        else:  # a small operation between the programs: with its result it needs less than the largest of them
            assert name not in names, f"the plan has no {name} of {shapes}"
            assert alive - before + sum(map(size_of, shapes)) <= largest + SLACK, (name, shapes)
    assert met == {(program.stage, program.name) for program in programs}
    assert max(excess.values()) <= SLACK, f"the plan holds more than the run does: {excess}"


def test_of_programs_alike_the_largest_and_the_fullest_are_kept() -> None:
    traced = [jax.jit(lambda x: x + 1).trace(jax.ShapeDtypeStruct((n,), "float32")) for n in (8, 4, 2)]
    programs = [Program("s", "a", t, live) for t, live in zip(traced, (50, 90, 10), strict=True)]
    other = Program("s", "b", traced[2], 10)
    assert largest_alike([*programs, other]) == [programs[0], programs[1], other]


def work(function, *shapes, dtype="float32"):
    return count_work(jax.jit(function).trace(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)).jaxpr)


def test_operations_are_counted() -> None:
    product = work(lambda a, b: a @ b, (3, 5), (5, 7), dtype="bfloat16")
    assert (product.matrix, product.vector) == (2 * 3 * 5 * 7, 0)
    assert product.moved == 2 * 2 * (3 * 5 + 5 * 7 + 3 * 7)  # once as arguments and results, once by the product
    single = work(lambda a, b: a @ b, (3, 5), (5, 7))
    assert (single.matrix, single.vector) == (0, 2 * 3 * 5 * 7)
    looped = work(lambda a: jax.lax.fori_loop(0, 10, lambda _, x: x + x, a), (8,))
    assert 80 <= looped.vector <= 100  # the counter is counted too
    assert looped.steps >= 10
    root = work(jax.lax.linalg.cholesky, (30, 30))
    assert root.vector >= 30**3 / 3
    chosen = work(lambda a: jax.lax.cond(a[0] > 0, lambda x: x @ x, lambda x: x, a.reshape(4, 4)), (16,))
    assert chosen.vector >= 2 * 4**3
    rounded = work(lambda a, b: jnp.dot(a, b, precision="tensorfloat32"), (3, 5), (5, 7))
    assert (rounded.matrix, rounded.vector) == (2 * 2 * 3 * 5 * 7, 0)
    unread = work(lambda a: (jnp.sin(a @ a), a + a)[1], (4, 4))
    assert (unread.vector, unread.steps) == (16, 1)
    turned = work(lambda a: jax.lax.switch(jnp.int32(a[0]), [lambda x: x] * 2 + [lambda x: jnp.sort(x)], a), (12,))
    assert turned.moved == 2 * 4 * 12 * (1 + 1 / 3)
    by_platform = work(lambda a: jax.lax.platform_dependent(a, cuda=lambda x: x, default=lambda x: x * x), (12,))
    assert by_platform.vector <= 1  # a card multiplies nothing
    assert product.times(3).matrix == 3 * product.matrix
    assert product.least_seconds(matrix_rate=210, vector_lr_scale=1, bandwidth=1e9) == pytest.approx(1, rel=1e-3)


def test_the_operations_of_a_search_are_those_of_its_kernel() -> None:
    """32 channels of 2 vectors of 4 weights, compared with 16 codes: 11 operations a pair, and the sums of deltas."""
    shapes = (32, 8), (32, 8), (32, 32), (16, 4)
    counted = work(lambda *a: NearestCodes().walk(Rows(*a[:3], None), a[3], outputs=8, interpret=True), *shapes)
    operations = 32 * 2 * (16 * 11 + 2 * 32 * 4)
    assert operations <= counted.vector <= operations + 200  # the codebook is laid out by columns and padded
    assert counted.steps == 2  # the kernel, and the program that it is in
