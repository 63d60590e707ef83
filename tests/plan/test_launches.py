"""Launches of compiled programs: of texts whose kernels were counted by hand, and of programs of known structure."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from compilers import needs_compiler

from cluscomp_jax.cli.plan import _launches
from cluscomp_jax.clustering import error_feedback
from cluscomp_jax.clustering.code_search import NearestCodes
from cluscomp_jax.clustering.error_feedback import HessianFactor
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.data import CalibrationConfig
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.models.llama import LlamaConfig
from cluscomp_jax.plan import Plan, Reserve, find_target, placement, plan, whole
from cluscomp_jax.plan.block_programs import targets
from cluscomp_jax.plan.host import HostRequirements
from cluscomp_jax.plan.launches import Launches, count_launches
from cluscomp_jax.plan.model_programs import embedding
from cluscomp_jax.plan.program import Memory, Program, compile_counted
from cluscomp_jax.plan.setting import BlockSpec
from cluscomp_jax.plan.shapes import AbstractDevice
from cluscomp_jax.plan.target import compiling_for
from cluscomp_jax.plan.whole import _calls, _compiled_of
from cluscomp_jax.plan.work import operations_of
from cluscomp_jax.runtime.reporter import SilentReporter

BODIES = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %n = f32[8]{0} negate(%p), metadata={op_name="jit(f)/neg" scheduling_name="n"}
  ROOT %s = f32[8]{0} sort(%n), dimensions={0}, to_apply=%add
}

%two (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %loop_add_fusion = s32[] fusion(%i), kind=kLoop, calls=%fused
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %sort.1 = f32[8]{0} sort(%x), dimensions={0}, to_apply=%add
  ROOT %tuple.1 = (s32[], f32[8]{0}) tuple(%loop_add_fusion, %sort.1)
}

%less (t.1: (s32[], f32[8])) -> pred[] {
  %t.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  ROOT %loop_compare_fusion = pred[] fusion(%i.1), kind=kLoop, calls=%fused
}

%four (u: (s32[], f32[8])) -> (s32[], f32[8]) {
  %u = (s32[], f32[8]{0}) parameter(0)
  %w = (s32[], f32[8]{0}) while(%u), condition=%less, body=%two, backend_config={"known_trip_count":{"n":"2"}}
  ROOT %r = (s32[], f32[8]{0}) bitcast(%w)
}

%one (v: (s32[], f32[8])) -> (s32[], f32[8]) {
  %v = (s32[], f32[8]{0}) parameter(0)
  ROOT %copy.1 = (s32[], f32[8]{0}) copy(%v)
}

"""
"""Computations of two, one, four and one launches: a fusion's own instructions are none."""

PLAIN = """  %q = f32[8]{0} parameter(0), sharding={mesh['card'=1], [{}]}
  %c = s32[] constant(0)
  %copy.9 = s32[] copy(%c)
  %wide = (f32[8]{0:T(8)S(5)}, /*index=1*/(f32[8]{0}, u8[16]{0})) custom-call(%q), custom_call_target="{target}"
  %part = f32[8]{0} get-tuple-element(%wide), index=0
  %done = f32[8]{0} reduce(%part, %c), dimensions={0}, to_apply=%add
  %b = f32[8]{0} bitcast(%done)
  ROOT %out = (f32[8]{0}, s32[]) tuple(%b, %copy.9)
"""

CASES = {
    "a custom call is one launch": (PLAIN.replace("{target}", "__cub$DeviceRadixSort"), 3, 0),
    "memory alone is none": (PLAIN.replace("{target}", "AllocateBuffer"), 2, 0),
    "a known loop, jax 0.12": (
        "  ROOT %w.1 = (s32[], f32[8]{0}) while(%q), condition=%less, body=%two, metadata={op_name=\"jit(f)/while\" "
        'stack_frame_id=3}, backend_config={"known_trip_count":{"n":"12"},"known_init_step":{"init":"0"}}',
        24, 0,
    ),
    "a known loop in a loop": (
        '  ROOT %w.1 = (s32[]) while(%q), condition=%less, body=%four, backend_config={"known_trip_count":{"n":"5"}}',
        20, 0,
    ),
    "a known loop, as an attribute": (
        '  ROOT %w.1 = (s32[]) while(%q), condition=%less, body=%two, known_trip_count={"n":"3"}', 6, 0,
    ),
    "a loop of unknown length has a turn and its condition": (
        '  ROOT %w.1 = (s32[], f32[8]{0}) while(%q), condition=%less, body=%four, metadata={op_name="while"}', 5, 1,
    ),
    "the dearer of two branches": (
        "  ROOT %k = (s32[], f32[8]{0}) conditional(%p.1, %q, %q), true_computation=%one, false_computation=%four",
        4, 0,
    ),
    "the dearest of several branches": (
        "  ROOT %k = (s32[]) conditional(%p.1, %q, %q, %q), branch_computations={%one, %four, %two}, metadata={x}",
        4, 0,
    ),
    "a call, and a command buffer": (
        "  %k = (s32[], f32[8]{0}) call(%q), to_apply=%two\n"
        "  ROOT %command_buffer = (s32[]) call(%k), to_apply=%four, frontend_attributes={a=\"b\"}", 6, 0,
    ),
    "asynchronous pairs count once, jax 0.12": (
        "  %fusion-start = ((f32[8]{0}, s32[]), f32[8]{0}, u32[]) fusion-start(%q, %c), kind=kLoop, calls=%fused\n"
        "  %fusion-done = f32[8]{0} fusion-done(%fusion-start)\n"
        "  %copy-start = (f32[8]{0:S(5)}, f32[8]{0}, u32[]) copy-start(%q)\n"
        "  %copy-done = f32[8]{0:S(5)} copy-done(%copy-start)\n"
        "  %all-reduce-start = f32[8]{0} all-reduce-start(%q), to_apply=%add\n"
        "  ROOT %all-reduce-done = f32[8]{0} all-reduce-done(%all-reduce-start)", 3, 0,
    ),
    "asynchronous calls count what they call": (
        "  %call-start = ((s32[]), s32[], u32[]) call-start(%q), to_apply=%two\n"
        "  %call-done = s32[] call-done(%call-start)\n"
        "  %async-start = ((s32[]), s32[], u32[]) async-start(%q), calls=%four, async_execution_thread=\"parallel\"\n"
        "  %async-update = ((s32[]), s32[], u32[]) async-update(%async-start)\n"
        "  ROOT %async-done = s32[] async-done(%async-update)", 6, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sign", ["%", ""])
def test_kernels_of_a_text_are_counted(case: str, sign: str) -> None:
    instructions, launches, unknown = CASES[case]
    text = BODIES + "ENTRY %main.7 (q: f32[8]) -> f32[8] {\n" + instructions + "\n}\n"
    assert count_launches(text.replace("%", sign)) == Launches(launches, unknown)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        count_launches("no module at all")
    with pytest.raises(ValueError, match="a conditional names no branches"):
        count_launches("ENTRY %main (q: f32[8]) -> f32[8] {\n  ROOT %k = f32[8]{0} conditional(%p, %q)\n}\n")


def two_sorts(x):
    """Two kernels on any card: neither fuses with anything."""
    return jnp.sort(jnp.sort(x, axis=0), axis=1)


def turns(count, body):
    return lambda x: jax.lax.fori_loop(0, count, lambda _, state: body(state), x)


STRUCTURES = {
    "sorts": (two_sorts, 2, 0),
    "elementwise": (lambda x: jnp.tanh(x) + 1, 1, 0),
    # A turn has the sorts and the counter; before the loop, the argument and the counter are copied.
    "7 turns": (turns(7, two_sorts), 7 * 3 + 2, 0),
    "19 turns": (turns(19, two_sorts), 19 * 3 + 2, 0),
    "a loop in a loop": (turns(3, turns(5, two_sorts)), 3 * (5 * 3 + 2) + 2, 0),
    "branches": (lambda x: jax.lax.cond(x[0, 0] > 0, two_sorts, lambda x: x + 1, x), 2 + 1, 0),
    # The argument is copied; the condition and the sorts count once.
    "unknown": (lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, two_sorts, x), 1 + 1 + 2, 1),
}


@needs_compiler
@pytest.mark.parametrize("name", STRUCTURES)
def test_a_compiled_program_has_the_launches_of_its_structure(name: str) -> None:
    function, launches, unknown = STRUCTURES[name]
    card = find_target("h100")
    with compiling_for(card):
        traced = jax.jit(function).trace(AbstractDevice(placement(card)).array(256, 256))
        _, counted = compile_counted(Program("s", "n", traced, 0))
    assert counted == Launches(launches, unknown)


def test_a_program_for_the_cpu_has_no_launches() -> None:
    traced = jax.jit(two_sorts).trace(AbstractDevice().array(8, 8))
    memory, counted = compile_counted(Program("s", "n", traced, 0))
    assert memory.argument_bytes == 256
    assert counted is None


def feeding(place: AbstractDevice, d_in: int, d_out: int, calls: float) -> Program:
    weight, fed = place.array(d_in, d_out), HessianFactor(place.array(d_in, dtype="int32"), place.array(d_in, d_in))
    stored = place.array(16, 4, dtype="float16")
    traced = error_feedback.assign_with_error_feedback.trace(weight, stored, fed, NearestCodes())
    return Program("assign", "codes", traced, 0, calls)


@pytest.mark.long
@needs_compiler
def test_programs_that_are_not_compiled_scale_with_their_steps() -> None:
    card = find_target("a6000")
    with compiling_for(card):
        place = AbstractDevice(placement(card))
        programs = [feeding(place, d_in, d_out, 1.0) for d_in, d_out in ((4096, 512), (8192, 256), (12288, 256))]
        assert len(_compiled_of(programs)) == 1
        each = [compile_counted(program)[1] for program in programs]
    assert each[2].launches > 2 * each[0].launches
    scaled = _calls([(program, program.work()) for program in programs], [(programs[2], each[2])])
    assert [launches.launches for launches in scaled] == pytest.approx([e.launches for e in each], rel=0.02)


def test_of_other_operations_under_one_name_one_is_compiled_too() -> None:
    def program(function, size: int) -> Program:
        return Program("s", "n", jax.jit(function).trace(jax.ShapeDtypeStruct((size,), "float32")), 10 * size)

    large, small, sine = program(jnp.cos, 9), program(jnp.cos, 3), program(jnp.sin, 4)
    other = program(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x), x), 2)
    assert _compiled_of([small, large, sine, program(jnp.sin, 2), other]) == [large, sine, other]
    assert operations_of(sine.traced.jaxpr) == ("sin",)
    assert "sin" in operations_of(other.traced.jaxpr)


TINY = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16,
)  # fmt: skip


@pytest.mark.long
@needs_compiler
def test_a_plan_reports_the_launches_of_a_whole_run(monkeypatch) -> None:
    """6 samples are looked up, a gather and at most what goes with it; each of 3 blocks passes them once."""

    def some(settings: list[BlockSpec], **_: object) -> Iterator[Program]:
        yield from embedding(settings[0])
        yield from targets(settings[0])

    monkeypatch.setattr(whole, "whole_run", some)
    cfg = CompressConfig(
        model=TINY,
        cluster=ClusterConfig(rules=(CompressionRule(group_size=4, num_codes=16),), massive_activation_limit=0.0),
        calibration=CalibrationConfig(samples=6, length=2048),
        tuning=None,
    )
    card = find_target("a6000")
    done = plan(cfg, card, AbstractDevice(placement(card)), context=32, reserve=Reserve(), reporter=SilentReporter())
    assert list(done.launches) == list(done.stages) == list(done.hours) == ["embed", "targets"]
    fields = done.to_dict()
    assert 6 <= fields["launches"]["embed"] <= 4 * 6
    assert fields["launches"]["targets"] % (3 * 6) == 0
    assert fields["launches"]["targets"] >= 3 * 6 * 10
    assert all(done.hours[stage] >= counted.launches * 5e-6 / 3600 for stage, counted in done.launches.items())


def test_the_table_says_where_loops_are_of_unknown_length() -> None:
    memory, counted = Memory("s", "p", 1, 1, 1, 1), {"a": Launches(2.87e9), "b": Launches(31, 2)}
    made = Plan("card", 8, 8, {"a": memory}, (memory,), counted, {}, HostRequirements(1, 2, 3, 4))
    assert [_launches(made, stage) for stage in ("a", "b", "c")] == ["2.9e9", "3.1e1+", "-"]
    assert made.to_dict()["launches"] == {"a": 2870000000, "b": 31}
    assert made.to_dict()["unknown_loops"] == {"a": 0, "b": 2}
