"""What `scripts.verify_kernels` reads and judges; no CUDA compiler is needed here."""

import dataclasses
import json

import pytest

from verify_kernels import __main__ as command
from verify_kernels import judge, measure
from verify_kernels.cases import LLAMA_2_70B, Case, shipped
from verify_kernels.compile import case_of, lower
from verify_kernels.sass import read_machine
from verify_kernels.searches import SearchCase, searches
from verify_kernels.traffic import read_accesses

PTXAS = """ptxas info    : Compiling entry function 'codebook_gemm' for 'sm_86'
ptxas info    : Function properties for codebook_gemm
    0 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 121 registers, used 1 barriers, 404 bytes cmem[0]
"""
SASS = """
.L_x_0:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0030*/              @!P0 HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0040*/              @P0  BRA `(.L_x_1) ;
        /*0050*/                   STL [R1], R8 ;
        /*0060*/              @P1  BRA `(.L_x_2) ;
.L_x_2:
        /*0070*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2], R8 ;
        /*0080*/                   MEMBAR.SC.GPU ;
        /*0090*/                   MEMBAR.ALL.CTA ;
        /*00a0*/                   EXIT ;
"""
DECODE = Case(kernel="forward", m=1, shape=(8192, 1024), g=4)


def test_the_texts_of_the_cuda_programs_are_read():
    machine = read_machine(PTXAS, SASS)
    assert (machine.registers, machine.spill_bytes, machine.local_instructions) == (121, 36, 1)
    assert (machine.mma, machine.loop_instructions, machine.per_32_mma) == (2, 4, 64)
    assert machine.opcodes["RED"] == machine.fences == 1


@pytest.mark.parametrize(("ptxas", "sass"), [("", SASS), (PTXAS, "")])
def test_texts_that_say_nothing_are_refused(ptxas, sass):
    with pytest.raises(ValueError, match="printed no"):
        read_machine(ptxas, sass)


def machine(**changed):
    fields = {
        "registers": 100,
        "spill_bytes": 0,
        "local_instructions": 0,
        "mma": 32,
        "loop_instructions": 120,
        "fences": 0,
    }
    return fields | {"opcodes": {"HMMA": 32}, "shared_bytes": 99 * 1024} | changed


GEMM = Case(kernel="forward", m=2048, shape=(8192, 8192), g=4)
SCATTER = dataclasses.replace(GEMM, kernel="scatter")
RED = {"HMMA": 32, "RED": 64}
OFFENCES = {
    "none": (GEMM, {}, None),
    "none of a scatter": (SCATTER, {"opcodes": RED}, None),
    "spill": (GEMM, {"spill_bytes": 8}, "spills 8 bytes"),
    "local memory": (GEMM, {"local_instructions": 2}, "2 local instructions"),
    "shared memory": (GEMM, {"shared_bytes": 99 * 1024 + 1}, "99 KiB are there"),
    "slow loop": (GEMM, {"loop_instructions": 131}, "131 instructions per 32"),
    "no tensor cores": (GEMM, {"opcodes": {}}, "no tensor cores"),
    "hidden atomic": (GEMM, {"opcodes": RED}, "64 atomics where the order must be fixed"),
    "fences": (SCATTER, {"opcodes": RED, "fences": 64}, "64 plain reductions, 0 other atomics, 64 fences"),
    "atomics with a result": (SCATTER, {"opcodes": {"HMMA": 32, "ATOMG": 64}}, "64 other atomics"),
}


@pytest.mark.parametrize(("case", "changed", "text"), OFFENCES.values(), ids=OFFENCES)
def test_a_planted_offence_is_named(case, changed, text):
    found = judge.failures(case, {"accesses": [], "archs": {"sm_86": machine(**changed)}})
    assert [text in sentence for sentence in found] == ([] if text is None else [True])


def test_a_compiler_that_fails_is_a_failure():
    assert judge.failures(GEMM, {"accesses": [], "archs": {"sm_86": {"error": "Boom"}}}) == ["sm_86: Boom"]


def accesses_of(case):
    lowered = lower(case)
    return read_accesses(lowered.bytecode, lowered.grid)


def test_a_token_reads_the_index_once_and_stores_every_part():
    x, index, codebook, store = accesses_of(DECODE)
    tile = DECODE.tile
    assert (index.kind, index.bytes, index.gathered) == ("load", 8192 * 256 * 2, False)
    assert x.bytes == 8192 * 2 * 1024 // tile.block_n
    assert codebook.gathered
    assert codebook.executions * codebook.elements == 8192 * 1024
    assert (store.kind, store.executions) == ("store", tile.splits * 1024 // tile.block_n)


@pytest.mark.parametrize("shape", LLAMA_2_70B)
@pytest.mark.parametrize(("g", "axis"), [(4, "out"), (8, "in"), (18, "out")])
def test_one_token_moves_little_more_than_the_index(shape, g, axis):
    case = dataclasses.replace(DECODE, shape=shape, g=g, axis=axis)
    report = {"accesses": [dataclasses.asdict(access) for access in accesses_of(case)], "archs": {}}
    assert 1 <= judge.decode_ratio(case, report) <= judge.DECODE_RATIO


TRELLIS = dataclasses.replace(DECODE, g=2, n=4096, step_bits=4)


def words_touched(case):
    """Returns the words that the windows of each program lie in, each once: as far as a tile goes, or a whole part."""
    depth, width = case.sides
    depth, width = (depth, -(-width // case.g)) if case.wide else (-(-depth // case.g), width)
    tile, window = case.tile, case.n.bit_length() - 1
    groups = tile.block_n // case.g if case.wide else depth // tile.splits
    first_bits = range(0, (width if case.wide else depth) * case.step_bits, groups * case.step_bits)
    spans = [(bit + (groups - 1) * case.step_bits + window - 1) // 32 - bit // 32 + 1 for bit in first_bits]
    return sum(spans) * (depth if case.wide else width)


@pytest.mark.parametrize("shape", [(8192, 1024), (8192, 8192)])
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("step_bits", [2, 4, 6, 8, 12])
def test_a_token_reads_the_words_of_its_windows(step_bits, axis, shape):
    case = dataclasses.replace(TRELLIS, step_bits=step_bits, axis=axis, shape=shape)
    accesses = accesses_of(case)
    streams = [access for access in accesses if access.argument == 1]
    own = {6: 3, 12: 3}.get(step_bits, 1)  # words after which a window begins with a word again
    assert sum(access.bytes for access in streams[:own]) == 4 * shape[0] * shape[1] // 2 * step_bits // 32
    assert judge._stream_bytes(case, step_bits, streams[0].executions) == 4 * words_touched(case)
    report = {"accesses": [dataclasses.asdict(access) for access in accesses], "archs": {}}
    assert 1 <= judge.decode_ratio(case, report) <= judge.decode_bound(case) == 1.10


def test_the_index_of_a_trellis_is_words():
    assert (TRELLIS.index_shape, TRELLIS.index_bytes) == ((8192, 65), 8192 * 65 * 4)  # 512 codes, 8 bits before them
    across = dataclasses.replace(TRELLIS, axis="in")
    assert (across.index_shape, across.codes) == ((513, 1024), 4096 * 1024)
    assert across.call()[1][2].dtype == "uint32"


def test_a_codebook_that_fits_l1_is_read_from_l2_once_a_program():
    assert judge.l2_bytes(TRELLIS) == TRELLIS.programs * 4096 * 2 * 2
    assert judge.l2_bytes(dataclasses.replace(TRELLIS, n=8192)) == 8192 * 512 * 32


def test_only_the_atomic_gradient_holds_atomics():
    for kernel in ("forward", "dx", "scatter", "segment"):
        case = Case(kernel=kernel, m=32, shape=(64, 64), g=4, n=256)
        atomics = [access for access in accesses_of(case) if access.kind == "atomic_rmw"]
        assert bool(atomics) == (kernel == "scatter")


def test_the_cases_have_names_of_their_own():
    names = [case.name for case in (*shipped(), *searches())]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", [DECODE, *searches()], ids=lambda case: case.name)
def test_a_case_goes_to_the_compiling_process_and_back(case):
    assert case_of(json.loads(json.dumps(dataclasses.asdict(case)))) == case


SEARCHES = {
    "none": ({}, None),
    "spill": ({"spill_bytes": 8}, "spills 8 bytes"),
    "shared memory": ({"shared_bytes": 99 * 1024 + 1}, "99 KiB are there"),
    "atomic": ({"opcodes": {"RED": 1}}, "1 atomics where the order must be fixed"),
}


@pytest.mark.parametrize(("changed", "text"), SEARCHES.values(), ids=SEARCHES)
def test_a_planted_offence_of_a_search_is_named(changed, text):
    case = SearchCase(kernel="walk", outputs=64, g=4, n=16)
    found = judge.failures(case, {"accesses": [], "archs": {"sm_86": machine(opcodes={}) | changed}})
    assert [text in sentence for sentence in found] == ([] if text is None else [True])


@pytest.mark.parametrize("case", [SearchCase(kernel="walk", outputs=64, g=3, n=16)], ids=lambda case: case.name)
def test_a_search_holds_one_kernel_without_atomics(case):
    accesses = accesses_of(case)
    assert {access.kind for access in accesses} == {"load", "store"}
    codes = [access for access in accesses if access.kind == "store" and access.argument == 4]
    assert sum(access.executions * access.elements for access in codes) >= 128 * 22


def test_a_case_that_cannot_be_compiled_fails_every_card(capsys, monkeypatch):
    monkeypatch.setattr(command, "shipped", lambda: iter([Case(kernel="forward", m=1, shape=(64, 64), g=99)]))
    monkeypatch.setattr(command, "searches", lambda: iter([]))
    assert command.main(["--arch", "sm_86"]) == 1
    printed = capsys.readouterr().out
    assert "0 pass, 1 fail" in printed
    assert "sm_86: " in printed


def test_an_unknown_case_is_a_wrong_argument(capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(["--only", "nothing"])
    assert caught.value.code == 2
    assert "no case has that in its name" in capsys.readouterr().err


@pytest.mark.parametrize(("n", "step_bits"), [(10, None), (16, 3)], ids=["plain", "trellis"])
@pytest.mark.parametrize("kernel", ["forward", "dx", "scatter", "segment"])
def test_values_and_times_are_measured(kernel, n, step_bits):
    case = Case(kernel=kernel, m=4, shape=(24, 16), g=4, n=n, dtype="float32", step_bits=step_bits)
    found = measure.measure(case, implementation="definition", calls=1)
    assert found.error <= measure.LIMITS["float32"]
    assert min(found.kernel_us, found.decoded_us, found.dense_us) > 0
