"""examples/diffusion_unet.py on a small random network, and with the real one where its file is at hand."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="pip install onnx onnxruntime")
onnx: Any = pytest.importorskip("onnx")

import importlib.util  # noqa: E402

from paths import ROOT  # noqa: E402

FILE = os.environ.get("CLUSCOMP_UNET_ONNX", "")


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("diffusion_unet", ROOT / "examples/diffusion_unet.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = load_example()
    for name, value in {"SIZE": 12, "LEAST": 200, "EVALUATED": range(3), "CALIBRATED": range(100, 116)}.items():
        monkeypatch.setattr(module, name, value)
    return module


@pytest.fixture
def model() -> Any:
    """denoised = conv(sigmoid(conv(noisy / 80) + linear(difficulty)) + sigma), of two kernels and one matrix."""
    random = np.random.default_rng(0)
    shapes = {"first": (24, 1, 3, 3), "second": (1, 24, 3, 3), "label": (24, 1), "between": (24, 24, 3, 3)}
    arrays = {name: random.standard_normal(shape).astype(np.float32) / 4 for name, shape in shapes.items()}
    arrays |= {"scale": np.float32([1 / 80]), "column": np.array([-1, 1]), "place": np.array([1, 24, 1, 1])}
    node = onnx.helper.make_node
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        node("Mul", ["noisy", "scale"], ["scaled"]),
        node("Conv", ["scaled", "first"], ["a"], **pads),
        node("Reshape", ["difficulty", "column"], ["d"]),
        node("Gemm", ["d", "label"], ["e"], transB=1),
        node("Reshape", ["e", "place"], ["f"]),
        node("Add", ["a", "f"], ["g"]),
        node("Sigmoid", ["g"], ["h"]),
        node("Conv", ["h", "between"], ["i"], **pads),
        node("Add", ["i", "sigma"], ["j"]),
        node("Sigmoid", ["i"], ["k"]),
        node("Conv", ["k", "second"], ["denoised"], **pads),
    ]
    info = onnx.helper.make_tensor_value_info
    inputs = [info("noisy", 1, [1, 1, 12, 12]), info("sigma", 1, [1]), info("difficulty", 1, [1])]
    graph = onnx.helper.make_graph(
        nodes,
        "small",
        inputs,
        [info("denoised", 1, [1, 1, 12, 12])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)


def test_what_is_read_are_the_kernels_and_their_inputs(example: Any, model: Any) -> None:
    weights = example.read_weights(model)
    assert {name: array.shape for name, array in weights.items()} == {
        "first": (24, 1, 3, 3),
        "second": (1, 24, 3, 3),
        "between": (24, 24, 3, 3),
    }
    session = example.open_session(model, list(weights), ["h", "i"])
    h, i = session.run(["h", "i"], example.inputs_of(0))
    kernel = weights["between"]
    rows = example.rows_of(h, kernel, np.random.default_rng(0))
    products = sorted((rows @ kernel.reshape(24, -1).T).tolist())
    np.testing.assert_allclose(products, sorted(i[0].reshape(24, -1).T.tolist()), atol=1e-4)


def test_weights_are_the_inputs_of_the_graph(example: Any, model: Any) -> None:
    weights = example.read_weights(model)
    session = example.open_session(model, list(weights))
    original = example.generate(session, {}, range(2))
    np.testing.assert_array_equal(example.generate(session, weights, range(2)), original)
    without = example.generate(session, {"second": 0 * weights["second"]}, range(2))
    assert not without.any()
    assert example.distance(without, original) == pytest.approx(1.0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_budget_is_kept_and_nearly_spent(example: Any, bits: int) -> None:
    random = np.random.default_rng(0)
    weights = {f"w{i}": random.standard_normal((32 + 16 * i, 288)).astype(np.float32) for i in range(8)}
    costs = {name: 4.0**i for i, name in enumerate(weights)}
    rounded, budget = example.round_to_nearest(weights, bits)
    assert budget == sum(bits * array.size + 16 * len(array) for array in weights.values())
    assert all(len(np.unique(array[0])) <= 2**bits for array in rounded.values())
    chosen = example.choose_settings(weights, costs, budget)
    spent = sum(setting.bits(weights[name]) for name, setting in chosen.items())
    assert 0.97 * min(budget, spent + 1) <= spent <= budget
    errors = [chosen[name].error for name in weights]
    assert errors[-1] < errors[0]


def test_the_whole_example_on_a_small_network(
    example: Any, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "small.onnx"
    onnx.save(model, file)
    monkeypatch.setattr(example, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    found = example.main([str(file), "--bits", "4", "--out", str(tmp_path / "images.png")])
    assert found.keys() == {4}
    (stored, rounded), (ours, clustered) = found[4].rounded, found[4].clustered
    assert ours <= stored
    assert 0 < clustered < rounded
    assert (tmp_path / "images.png").read_bytes()[:4] == b"\x89PNG"
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_another_file_is_refused(example: Any, tmp_path: Path) -> None:
    (tmp_path / "other.onnx").write_bytes(b"other")
    with pytest.raises(SystemExit, match="is not the network of adaptive-terrain-diffusion"):
        example.main([str(tmp_path / "other.onnx")])


@pytest.mark.slow
@pytest.mark.skipif(not FILE, reason="CLUSCOMP_UNET_ONNX names the file of adaptive-terrain-diffusion 0.4.2")
def test_images_are_half_as_far_from_the_original_as_rounded_ones(tmp_path: Path) -> None:
    found = load_example().main([FILE, "--bits", "4", "3", "--out", str(tmp_path / "images.png")])
    for one in found.values():
        (stored, rounded), (ours, clustered) = one.rounded, one.clustered
        assert ours <= stored
        assert clustered <= 0.5 * rounded
