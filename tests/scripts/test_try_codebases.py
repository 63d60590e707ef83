"""scripts/try_codebases.py: its numbers of the two Llamas it has itself, and what it says where something is wrong."""

import dataclasses

import jax
import pytest

import try_codebases
from codebases import CODEBASES, Case, Codebase
from codebases.own_llamas import linen_llama

LINEN = next(codebase for codebase in CODEBASES if codebase.name == "linen-llama")


@pytest.mark.parametrize("name", ["linen-llama", "nnx-llama"])
# qwix 0.1.8 asks a model for its modules in a way that Flax 0.12.12 is about to drop.
@pytest.mark.filterwarnings("ignore:The 'm.iter_modules:DeprecationWarning")
def test_a_llama_of_our_own(name: str) -> None:
    (codebase,) = (codebase for codebase in CODEBASES if codebase.name == name)
    result = try_codebases.attempt(codebase)
    assert result.problem is None
    assert not result.failed
    assert (result.kernels, result.served, result.decoded, result.lines) == (14, 14, 0, 4)
    # 16 codes: 4 bits for 4 weights, and a codebook of 16 * 4 numbers for each kernel.
    shapes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    weights = sum(d_in * d_out for d_in, d_out in shapes)
    assert result.bits == pytest.approx(1 + 7 * 16 * 16 * 4 / weights)


@pytest.mark.parametrize("name", ["equinox", "tunix-llama3", "tunix-qwen3", "keras-hub-llama3", "gemma3", "maxtext"])
@pytest.mark.filterwarnings("ignore")  # theirs
def test_a_codebase_of_others_where_it_is_installed(name: str) -> None:
    (codebase,) = (codebase for codebase in CODEBASES if codebase.name == name)
    if not codebase.installed:
        pytest.skip(f"needs {codebase.install}")
    with jax.numpy_dtype_promotion("standard"):
        result = try_codebases.attempt(codebase)
    assert result.problem is None
    assert not result.failed
    assert result.decoded == 0


def test_eleven_codebases_of_different_names() -> None:
    assert len({codebase.name for codebase in CODEBASES}) == len(CODEBASES) == 11


def test_what_is_missing_is_no_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    missing = Codebase("linen-llama", "no_such_module.inside", "none", "pip install it", linen_llama)
    monkeypatch.setattr(try_codebases, "CODEBASES", (missing,))
    monkeypatch.setattr("sys.argv", ["try_codebases.py"])
    assert try_codebases.main() == 0
    assert "linen-llama: not installed (pip install it)" in capsys.readouterr().out


def wrong_llama() -> Case:
    """A host that computes something else with a codebook than with an array."""
    case = linen_llama()
    calls: list[int] = []

    def forward(params: object, ids: jax.Array) -> jax.Array:
        calls.append(1)
        return case.forward(params, ids) * len(calls)

    return dataclasses.replace(case, forward=forward, through_qwix=None)


def broken_llama() -> Case:
    """A codebase that raises."""
    raise KeyError("layers")


@pytest.mark.parametrize("build", [wrong_llama, broken_llama])
def test_what_differs_or_raises_is_a_failure(monkeypatch: pytest.MonkeyPatch, build: object) -> None:
    monkeypatch.setattr(try_codebases, "CODEBASES", (dataclasses.replace(LINEN, build=build),))
    monkeypatch.setattr("sys.argv", ["try_codebases.py", "--only", "linen-llama"])
    assert try_codebases.main() == 1
