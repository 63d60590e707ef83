"""Writes PyTorch's logits of tests/fixtures/tiny_llama next to it, after scripts/train_fixture.py has made a new one.

Run with the parity extra installed; the default tests then need no PyTorch:

    python scripts/make_tiny_llama_logits.py tests/fixtures/tiny_llama tests/fixtures/tiny_llama_logits.safetensors

`tokens` int32 [1, t] are the first of the held-out text; `positions` int32 [p] are every fourth of theirs, and
`logits` float32 [1, p, v] what PyTorch computes there in float32 from the bfloat16 weights. The metadata holds its
perplexity of the first `windows` windows of that text, each as long as the model's context.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

from cluscomp_jax import data

STRIDE = 4
WINDOWS = 64


def reference_perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """Returns exp of the mean loss over int windows [w, t], each scored on all but its first token."""
    total = 0.0
    with torch.inference_mode():
        for window in windows:
            logits = model(window[None]).logits[0, :-1].double()
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return math.exp(total / windows[:, 1:].numel())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="the Hugging Face folder")
    parser.add_argument("output", type=Path, help="the safetensors file; an older one is replaced")
    options = parser.parse_args()

    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    context = model.config.max_position_embeddings
    tokens = torch.tensor(tokenizer(data.text("wiki_test"), verbose=False)["input_ids"])
    positions = np.arange(STRIDE - 1, context, STRIDE)
    with torch.inference_mode():
        logits = model(tokens[None, :context]).logits[:, positions].numpy()
    perplexity = reference_perplexity(model, tokens[: WINDOWS * context].reshape(WINDOWS, context))
    tensors = {
        "tokens": tokens[None, :context].numpy().astype(np.int32),
        "positions": positions.astype(np.int32),
        "logits": np.ascontiguousarray(logits),
    }
    metadata = {"perplexity": f"{perplexity:.6f}", "windows": str(WINDOWS), "torch": torch.__version__}
    save_file(tensors, options.output, metadata=metadata)
    print(f"{options.output}: {options.output.stat().st_size} bytes, perplexity {perplexity:.4f} of {WINDOWS} windows")


if __name__ == "__main__":
    main()
