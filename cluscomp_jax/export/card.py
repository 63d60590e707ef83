"""The model card of an export: README.md with what the checkpoint records of itself. Measures nothing."""

import json
from collections.abc import Mapping
from typing import Any

from cluscomp_jax import _version as version
from cluscomp_jax.reporting.tables import format_bytes, format_table

_USE = {
    "dense": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```

The matrices are stored decoded, so any server of the original model serves it; it takes the original's memory.""",
    "aqlm": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer  # pip install transformers accelerate aqlm[cpu]

model = AutoModelForCausalLM.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```

AQLM checkpoints decode to exactly the compressed weights. Matrices cut along "in" with g of 8 or 16 and 16-bit codes
are the form that aqlm's CUDA kernels run; others are decoded at every call.""",
    "orbax": """```python
import orbax.checkpoint as ocp

with ocp.StandardCheckpointer() as checkpointer:
    params = checkpointer.restore("/absolute/path/of/this/folder/params")
```

Decoded parameters in FlaxLlama layout, kernels `[d_in, d_out]`; `config.json` is the model's.""",
    "orbax-codebook": """```python
import json

import jax.numpy as jnp
import orbax.checkpoint as ocp

with ocp.StandardCheckpointer() as checkpointer:
    params = checkpointer.restore("/absolute/path/of/this/folder/params")
described = json.load(open("codebooks.json"))  # {path: {"shape": [d_in, d_out], "axis": "out" or "in"}}


def decode(kernel, shape, axis):  # kernel: {"codebook": [codes, g], "index": [d_in, ceil(d_out/g)] or the like}
    vectors = kernel["codebook"][kernel["index"]]
    rows, columns, g = vectors.shape
    if axis == "in":
        vectors = jnp.swapaxes(vectors, 1, 2).reshape(rows * g, columns)
    else:
        vectors = vectors.reshape(rows, columns * g)
    return vectors[: shape[0], : shape[1]]
```

The compressed parameters as plain arrays, FlaxLlama layout, kernels `[d_in, d_out]`.""",
}


def model_card(manifest: Mapping[str, Any], *, form: str, command: str) -> str:
    """Returns the text of README.md.

    Args:
      manifest: of the checkpoint, in its JSON form.
      form: the format of the export.
      command: the command line that exported.
    """
    provenance, totals, metrics = manifest["provenance"], manifest["totals"], manifest["metrics"]
    origin = provenance.get("model") or {}
    name = str(origin.get("name", "unknown"))
    front = ["---", *([f"base_model: {name}"] if name.count("/") == 1 else []), "tags: [cluscomp, compressed]", "---"]
    sections = [
        "\n".join(front),
        f"# {name}, compressed by clustering\n\nMade by cluscomp_jax (ClusComp, arXiv 2503.13089); format: {form}.",
        "## Use\n\n" + _USE[form],
        "## What it is\n\n```\n" + _facts(origin, totals, provenance) + "\n```",
    ]
    measured = metrics.get("perplexity") or {}
    if measured:
        rows = [
            (which, f"{m['perplexity']:.4f}", f"{m['windows']} x {m['context']}")
            for which, m in measured.items()
            if m["perplexity"] is not None
        ]
        sections.append("## Perplexity\n\n```\n" + format_table(("model", "perplexity", "tokens"), rows) + "\n```")
    made = provenance.get("command")
    lines = [*([str(made)] if made else []), command]
    settings = json.dumps(manifest["run_config"], indent=1)
    versions = provenance.get("versions") or {}
    now = {f"export: {name}": v for name, v in version.versions().items() if versions.get(name) != v}
    sections += [
        "## Made by\n\n```\n" + "\n".join(lines) + "\n```",
        f"Settings:\n\n```json\n{settings}\n```",
        "Versions: " + ", ".join(f"{name} {v}" for name, v in {**versions, **now}.items()) + ".",
    ]
    return "\n\n".join(sections) + "\n"


def _facts(origin: Mapping[str, Any], totals: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    rows = [("base model", f"{origin.get('name', 'unknown')} ({origin.get('kind', 'unknown')})")]
    if totals["bits_per_weight"] is not None:
        rows.append(("bits per weight", f"{totals['bits_per_weight']:.3f}, codebooks included"))
    rows += [
        ("compressed matrices", f"{totals['matrices']}, {totals['matrix_weights']:,} weights"),
        ("other parameters", f"{totals['tensor_weights']:,} weights, {format_bytes(totals['tensor_bytes'])}"),
        ("compressed size", format_bytes(totals["matrix_bits"] / 8 + totals["tensor_bytes"])),
    ]
    calibration = provenance.get("calibration")
    if calibration:
        samples, length = calibration["shape"]
        rows.append(("calibration", f"{calibration['name']}, {samples} x {length} tokens"))
    else:
        rows.append(("calibration", "none"))
    return format_table(("what", "value"), rows)
