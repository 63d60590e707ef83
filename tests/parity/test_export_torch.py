"""Exports loaded by transformers (and aqlm) in PyTorch on the CPU: the same weights to the bit, the same logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_models import coded, decoded, make_params, save

from cluscomp_jax.checkpoint.reader import CheckpointSource
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.export import ExportFormat, export_checkpoint
from cluscomp_jax.models.llama import forward

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "out": ({"g": 4, "n": 300}, {}),
    "in, as the CUDA kernels want it": ({"g": 8, "n": 3000, "axis": "in"}, {"code_bits": 16}),
    "7 bits": ({"g": 8, "n": 100, "axis": "in"}, {}),
    "8 bits along in": ({"g": 8, "n": 256, "axis": "in"}, {}),
    "8 bits along out": ({"g": 2, "n": 200}, {}),
    "one code": ({"g": 2, "n": 1}, {}),
    "tied": ({"g": 4, "tied": True}, {}),
    "biases": ({"g": 4, "bias": True}, {}),
}


def check(source: CheckpointSource, params: Any, folder: Path) -> Any:
    """Holds logits within 1e-5 of the largest, and returns the PyTorch model."""
    tokens = np.random.default_rng(0).integers(0, 40, (2, 50))
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    with torch.no_grad():
        found = model(torch.from_numpy(tokens)).logits.numpy()
    want = np.asarray(forward(params, tokens, source.model_config))
    assert np.abs(found - want).max() <= 1e-5 * np.abs(want).max()
    return model


def module_of(model: Any, path: str) -> Any:
    return model.get_submodule(path.removesuffix("/kernel").replace("/", "."))


@pytest.mark.parametrize(("options", "asked"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("form", ["aqlm", "dense"])
def test_transformers_loads_it(
    tmp_path: Path, options: dict[str, Any], asked: dict[str, Any], form: ExportFormat
) -> None:
    if form == "aqlm":
        pytest.importorskip("aqlm")
        from aqlm.utils import _dequantize_weight, unpack_int_data
    params = make_params(**options)
    changes = {
        "tie_word_embeddings": options.get("tied", False),
        "attention_bias": options.get("bias", False),
        "mlp_bias": options.get("bias", False),
    }
    source = save(tmp_path / "small", params, **changes)
    export_checkpoint(source, tmp_path / "out", form, **(asked if form == "aqlm" else {}))
    model = check(source, params, tmp_path / "out")
    for path, leaf in trees.flatten(params).items():
        if not isinstance(leaf, CodebookArray):
            continue
        module = module_of(model, path)
        if form == "aqlm":
            assert type(module).__name__ == "QuantizedLinear"
            codes = unpack_int_data(module.codes, module.nbits_per_codebook)
            weight = _dequantize_weight(codes, module.codebooks, module.scales)
        else:
            weight = module.weight
        np.testing.assert_array_equal(weight.detach().numpy().T, decoded(leaf).astype(np.float32))


def test_a_mixture_of_dense_and_compressed_kernels_loads(tmp_path: Path) -> None:
    pytest.importorskip("aqlm")
    params = make_params()
    up = params["model"]["layers"]["1"]["mlp"]["up_proj"]
    up["kernel"] = decoded(up["kernel"])
    source = save(tmp_path / "small", params)
    export_checkpoint(source, tmp_path / "out", "aqlm")
    model = check(source, params, tmp_path / "out")
    assert type(model.model.layers[1].mlp.up_proj).__name__ == "Linear"
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "QuantizedLinear"


def test_mixed_settings_load_as_dense(tmp_path: Path) -> None:
    params = make_params(g=5)
    kernel = coded(np.random.default_rng(0), (64, 96), g=3, n=10, axis="in")
    params["model"]["layers"]["1"]["mlp"]["gate_proj"]["kernel"] = kernel
    source = save(tmp_path / "small", params)
    export_checkpoint(source, tmp_path / "out", "dense", shard_bytes=30_000)
    check(source, params, tmp_path / "out")
