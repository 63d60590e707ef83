"""Embeddings as calibration: padding moved to the end, weights, files, and what is refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from small_llamas import WINDOWED

from cluscomp_jax import Embeddings, InputError
from cluscomp_jax.models.calibration import check_embeddings, digest_of, read_embeddings
from cluscomp_jax.models.model import build_model

MASKS = hnp.arrays(np.bool_, st.tuples(st.integers(1, 4), st.integers(1, 6))).filter(
    lambda mask: mask.any(axis=1).all()
)


def embeddings(samples: int = 3, t: int = 5, d: int = 4, **arrays: Any) -> Embeddings:
    inputs = np.random.default_rng(0).standard_normal((samples, t, d)).astype(np.float32)
    return Embeddings(**{"inputs": inputs, **arrays})


@given(mask=MASKS)
def test_packing_keeps_valid_positions_in_order(mask: np.ndarray) -> None:
    tokens = np.arange(mask.size).reshape(mask.shape)
    given = embeddings(*mask.shape, mask=mask, tokens=tokens)
    packed = given.packed()
    longest = max(sum(row) for row in mask.tolist())
    assert packed.shape == (len(mask), longest) or mask.all()
    for i, row in enumerate(mask.tolist()):
        kept = [j for j, valid in enumerate(row) if valid]
        assert packed.tokens is not None
        np.testing.assert_array_equal(packed.inputs[i, : len(kept)], given.inputs[i, kept])
        assert packed.tokens[i].tolist() == [int(tokens[i, j]) for j in kept] + [-1] * (packed.shape[1] - len(kept))
        if packed.mask is not None:
            assert packed.mask[i].tolist() == [j < len(kept) for j in range(packed.shape[1])]
        assert not packed.inputs[i, len(kept) :].any()


@given(mask=MASKS)
def test_weights_are_zero_at_padding_and_one_on_average(mask: np.ndarray) -> None:
    weights = embeddings(*mask.shape, mask=mask).weights
    if mask.all():
        assert weights is None
        return
    assert weights is not None
    assert weights.dtype == np.float32
    assert not weights[~mask].any()
    assert len(set(weights[mask].tolist())) == 1
    assert weights.mean() == pytest.approx(1.0, rel=mask.size * 2.0**-23)


def test_nan_at_padding_is_of_no_account() -> None:
    inputs = np.ones((1, 3, 2), np.float32)
    inputs[0, 1] = np.nan
    packed = Embeddings(inputs, np.array([[1, 0, 1]])).packed()
    np.testing.assert_array_equal(packed.inputs, np.ones((1, 2, 2)))
    assert packed.mask is None


def test_everything_is_in_the_digest() -> None:
    inputs, mask, tokens = np.ones((2, 3, 4), np.float32), np.array([[1, 1, 1], [1, 1, 0]]), np.zeros((2, 3), int)
    forms = [
        Embeddings(inputs),
        Embeddings(inputs.astype(np.float16)),
        Embeddings(2 * inputs),
        Embeddings(inputs, mask),
        Embeddings(inputs, None, tokens),
        Embeddings(inputs, mask, tokens),
        Embeddings(inputs, mask, tokens + 1),
    ]
    assert len({digest_of(form) for form in forms}) == len(forms)
    assert digest_of(None) is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"inputs": np.ones((2, 3, 4), int)}, "calibration embeddings are int64 [2, 3, 4]; they must be floating"),
        ({"inputs": np.ones((2, 3), np.float32)}, "calibration embeddings are float32 [2, 3]"),
        ({"inputs": np.ones((2, 0, 4), np.float32)}, "calibration embeddings are float32 [2, 0, 4]"),
        (
            {"inputs": np.full((3, 5, 4), np.inf, np.float32)},
            "calibration embeddings: sample 0 holds NaN or Inf at valid positions",
        ),
        ({"mask": np.ones((3, 4), bool)}, "calibration mask is bool [3, 4]; it must be bool, or 0 and 1, [3, 5]"),
        ({"mask": np.full((3, 5), 0.5)}, "calibration mask is float64 [3, 5]"),
        ({"mask": np.zeros((3, 5), bool)}, "calibration mask leaves no position of sample 0 and 2 more; leave the"),
        ({"mask": np.eye(3, 5) * [[1], [0], [1]]}, "calibration mask leaves no position of sample 1; leave the sample"),
        ({"tokens": np.zeros((3, 4), int)}, "calibration tokens are int64 [3, 4]; the embeddings' must be integers"),
        ({"tokens": np.zeros((3, 5))}, "calibration tokens are float64 [3, 5]"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as error:
        embeddings(**arrays)
    assert "\n" not in str(error.value)
    np.savez(tmp_path / "e.npz", **{"inputs": np.ones((3, 5, 4), np.float32), **arrays})
    with pytest.raises(InputError, match=re.escape(f"e.npz: {message}")):
        read_embeddings(tmp_path / "e.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"inputs": np.ones((1, 2, 11), np.float32)},
            "calibration embeddings have width 11, the model's blocks read 12",
        ),
        ({"tokens": np.full((1, 2), 24)}, "calibration: token 24 is outside the vocabulary, 0 to 23"),
        ({"tokens": np.full((1, 2), -100)}, "calibration: token -100; a position without one is -1"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(arrays: dict[str, Any], message: str) -> None:
    given = Embeddings(**{"inputs": np.ones((1, 2, 12), np.float32), **arrays})
    with pytest.raises(InputError, match=re.escape(message)):
        check_embeddings(given, build_model(WINDOWED))


def test_files_read_back(tmp_path: Path) -> None:
    given = embeddings(mask=np.arange(15).reshape(3, 5) % 4 > 0, tokens=np.arange(15).reshape(3, 5))
    np.savez(tmp_path / "e.npz", inputs=given.inputs, mask=given.mask, tokens=given.tokens)
    assert digest_of(read_embeddings(tmp_path / "e.npz")) == digest_of(given)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "not read as embeddings (.npz)"),
        (lambda path: path.write_bytes(b"PK\x03\x04 no zip"), "not read as embeddings (.npz)"),
        (lambda path: path.write_text("words"), "not read as embeddings (.npz): it is no .npz file"),
        (lambda path: np.savez(path, x=np.ones(3)), "has the arrays ['x']; inputs is needed"),
        (
            lambda path: np.savez(path, inputs=np.array([{}], object)),
            "not read as embeddings (.npz): it is no .npz file, or has objects",
        ),
    ],
)
def test_files_that_cannot_be_read_end_in_one_line(tmp_path: Path, write: Any, message: str) -> None:
    write(tmp_path / "e.npz")
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_embeddings(tmp_path / "e.npz")
    assert "\n" not in str(error.value)
