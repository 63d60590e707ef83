"""The GPTQ of scripts/bench_quality_baselines.py against OBQ written out channel by channel in float64 NumPy."""

import numpy as np
import pytest
from script_modules import load_script

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

baselines = load_script("bench_quality_baselines")

CHANNELS, OUTPUTS, BITS = 150, 6, 3


@pytest.fixture(scope="module")
def problem() -> tuple[np.ndarray, np.ndarray]:
    """A kernel [CHANNELS, OUTPUTS] and the second hessian of correlated inputs of which one is never active."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((400, 40)) @ rng.standard_normal((40, CHANNELS)) + rng.standard_normal((400, CHANNELS))
    inputs[:, 7] = 0
    return rng.standard_normal((CHANNELS, OUTPUTS)), inputs.T @ inputs / len(inputs)


def grid_of(weights):
    low, high = np.minimum(weights.min(0), 0), np.maximum(weights.max(0), 0)
    scale = ((high - low) / (2**BITS - 1)).astype(np.float16).astype(np.float64)
    return scale, np.round(-low / scale)


def nearest(weights, scale, zero):
    return scale * (np.clip(np.round(weights / scale) + zero, 0, 2**BITS - 1) - zero)


def obq(kernel, hessian, group, act_order):
    """Every channel's error spread over all channels left, by the inverse hessian of these taken anew each time."""
    damped = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(CHANNELS)
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(CHANNELS)
    current, grids = kernel.copy(), {}
    for step, channel in enumerate(order):
        start = channel // group * group
        if start not in grids:
            grids[start] = grid_of((kernel if act_order else current)[start : start + group])
        left = order[step:]
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        rounded = nearest(current[channel], *grids[start])
        current[left[1:]] -= np.outer(inverse[1:, 0] / inverse[0, 0], current[channel] - rounded)
        current[channel] = rounded
    return current


def output_error(kernel, hessian, quantised):
    return np.trace((kernel - quantised).T @ hessian @ (kernel - quantised))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [CHANNELS, 140, 48, 32])  # above and below the 128 channels of a lazy batch
def test_gptq_is_obq_with_a_fixed_order_and_beats_rounding(problem, group, act_order):
    kernel, hessian = problem
    setting = baselines.Quantizer(BITS, group)
    tensors = torch.from_numpy(kernel), torch.from_numpy(hessian)
    actual = baselines.gptq(*tensors, setting, act_order=act_order).numpy()
    np.testing.assert_array_equal(actual, obq(kernel, hessian, group, act_order))
    rounded = baselines.rtn(tensors[0], setting).numpy()
    assert output_error(kernel, hessian, actual) < 0.5 * output_error(kernel, hessian, rounded)
    np.testing.assert_array_equal(tensors[0].numpy(), kernel)


def test_rounding_uses_the_grid_of_each_group(problem):
    kernel, _ = problem
    actual = baselines.rtn(torch.from_numpy(kernel), baselines.Quantizer(BITS, 64)).numpy()
    expected = [nearest(part, *grid_of(part)) for part in (kernel[:64], kernel[64:128], kernel[128:])]
    np.testing.assert_array_equal(actual, np.concatenate(expected))


def test_a_group_of_zeros_stays_zero():
    zeros = torch.zeros(4, 3)
    assert not baselines.rtn(zeros, baselines.Quantizer(2, 4)).any()
    assert not baselines.gptq(zeros, torch.zeros(4, 4), baselines.Quantizer(2, 4)).any()


def test_bits_count_the_shorter_last_group_in_full():
    assert baselines.stored_bits((576, 192), baselines.Quantizer(4, 128)) == 192 * (576 * 4 + 5 * (16 + 4))


@pytest.mark.parametrize("wrong", [["--setting", "3"], ["--setting", "9:64"], ["--context", "9999"], ["--model", "no"]])
def test_wrong_input_is_one_line_and_exit_code_2(wrong, tmp_path, capsys):
    assert baselines.main(["--out", str(tmp_path / "results.jsonl"), *wrong]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench_quality_baselines: error: ")
