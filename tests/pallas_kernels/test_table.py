"""Tables of tiles: written, read, used, refused; how the fastest are found."""

import json

import jax
import pytest
from kernel_problems import Problem

from pallas_kernels._compat import lowering_for
from pallas_kernels.codebook_matmul import codebook_matmul, config
from pallas_kernels.codebook_matmul.table import TUNED, key_of, read_table, tile_of, write_table
from verify_kernels import __main__ as command
from verify_kernels.cases import Case
from verify_kernels.tune import candidates, tune

KEY = (32, 64, 128, 4, 16, 2)
TILE = config.GemmConfig(block_m=32, block_n=32, block_k=16, num_warps=2, num_stages=3)


def test_a_table_comes_back_as_it_was_written_and_is_never_written_over(tmp_path):
    table = ((KEY, TILE), ((*KEY, 3, 1), TILE))
    write_table(tmp_path / "table.json", table)
    assert read_table(tmp_path / "table.json") == table
    with pytest.raises(FileExistsError):
        write_table(tmp_path / "table.json", ())


def test_programs_traced_inside_take_their_tiles_from_the_table():
    problem = Problem(m=32, d_in=64, d_out=128, n=16, g=4, axis="out", dtype="bfloat16")
    x, codebook, index, _ = problem.arrays()
    product = jax.jit(lambda x: codebook_matmul(x, codebook, index, **problem.static, implementation="triton"))

    def lowered():
        with lowering_for((8, 6)):
            return product.trace(x).lower(lowering_platforms=("cuda",)).as_text()

    with TUNED(((KEY, TILE),)):
        assert "num_warps = 2" in lowered()
        assert tile_of((33, *KEY[1:])) == config.gemm_config(33, 64, 128, g=4, n=16, itemsize=2)
    assert "num_warps = 2" not in lowered()


def test_a_trellis_index_has_an_entry_of_its_own():
    steps = config.Steps(3, wide=True)
    key = key_of(32, 64, 128, g=4, n=16, itemsize=2, steps=steps)
    with TUNED(((key, TILE),)):
        assert tile_of(key) == TILE
        assert tile_of(KEY) == config.gemm_config(32, 64, 128, g=4, n=16, itemsize=2)
        fixed = {"g": 4, "n": 16, "itemsize": 2, "steps": config.Steps(3, wide=False)}
        assert tile_of(key_of(1, 64, 128, **fixed)) == config.gemm_config(1, 64, 128, **fixed)


WRONG = {
    "no JSON": ("[", "JSONDecodeError"),
    "no tile": (json.dumps([{"product": KEY}]), "KeyError"),
    "unknown field": (json.dumps([{"product": KEY, "tile": {"block": 1}}]), "TypeError"),
    "short key": (json.dumps([{"product": [1, 2], "tile": {}}]), "ValueError"),
    "half a trellis": (json.dumps([{"product": [*KEY, 3], "tile": {}}]), "of a trellis index 8, not 7"),
    "odd block": (
        json.dumps([{"product": KEY, "tile": {"block_m": 24, "block_n": 32, "block_k": 32}}]),
        "block_m is 24; it must be a power of two, 16 or more",
    ),
}


@pytest.mark.parametrize(("text", "said"), WRONG.values(), ids=WRONG)
def test_what_is_no_table_is_refused_in_one_line(text, said, tmp_path):
    file = tmp_path / "table.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"table\.json") as caught:
        read_table(file)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("m", [1, 100, 2048])
def test_the_fastest_candidate_is_chosen(m):
    case = Case(kernel="dx", m=m, shape=(512, 1024), g=18)
    last = candidates(case)[-1]
    ((key, tile),) = tune([case, Case(kernel="scatter", m=8, shape=(8, 8), g=4)], lambda _, tile: tile != last)
    assert key == (m, 1024, 512, 18, 65536, 2)
    assert tile == last
    assert candidates(case)[0] == case.tile


def test_tuning_without_a_gpu_is_a_wrong_argument(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command.Path, "exists", lambda _: False)
    with pytest.raises(SystemExit) as caught:
        command.main(["--tune", str(tmp_path / "table.json")])
    assert caught.value.code == 2
    assert "there is no GPU to try on" in capsys.readouterr().err
