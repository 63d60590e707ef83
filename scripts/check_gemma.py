"""A real model of the Gemma 3 family: perplexity here, in PyTorch, and after compression, of one GGUF file.

    python scripts/check_gemma.py gemma3-270m.gguf --text wiki_test.txt.gz --calibration wiki_train.txt.gz --bits 3

Every window and every calibration sample begins with BOS, as Gemma expects it; the recipe is the default one, followed
by `--recover` steps of recovery. `cluscomp compress --begin-windows` makes the same and resumes. The file's weights are
4-bit, so the figures are not those of the original model. transformers is asked where it is installed with PyTorch
(`pip install ".[parity]"`), else left out.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_jax import CalibrationConfig, ClusterConfig, CompressConfig, compress, open_model, perplexity, size_report
from cluscomp_jax.config.recovery import RecoveryConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.io.gguf.source import GgufSource
from cluscomp_jax.runtime.reporter import console_reporter
from cluscomp_jax.text.text import begin_windows, calibration_samples, load_tokens


def torch_perplexity(file: Path, windows: np.ndarray) -> float | None:
    """Returns the perplexity of windows int [n, context] by transformers' own loading of the file, float32."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    total = 0.0
    for window in windows:
        tokens = torch.from_numpy(window[None].astype(np.int64))
        with torch.no_grad():
            logits = model(tokens).logits[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
    return float(np.exp(total / (len(windows) * (windows.shape[1] - 1))))


def main() -> None:
    """Prints one line of JSON for each figure as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration")
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--recover", type=int, default=0, metavar="STEPS")
    parser.add_argument("--epochs", type=int, default=BlockTuningConfig().epochs)
    parser.add_argument("--torch", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    opened = open_model(options.file)
    tokenizer = opened.load_tokenizer()
    begin, context = int(tokenizer.bos_token_id), options.context
    stream = begin_windows(load_tokens(options.text, tokenizer), begin, context)[: options.windows * context]
    shown: dict[str, Any] = {"windows": len(stream) // context, "context": context, "windows_begin_with": begin}
    source = GgufSource(options.file, dtype=np.float32)  # as transformers dequantises; open_model rounds to bfloat16
    original = perplexity(source, stream, opened.config, context=context)
    print(json.dumps(shown | {"ours": original.perplexity, "seconds": original.seconds}), flush=True)
    if options.torch:
        theirs = torch_perplexity(options.file, stream.reshape(-1, context))
        print(json.dumps({"transformers": theirs}), flush=True)
    if options.calibration is None:
        return
    cfg = CompressConfig(
        model=opened.config,
        cluster=ClusterConfig(bits=options.bits),
        tuning=BlockTuningConfig(epochs=options.epochs) if options.epochs else None,
        calibration=CalibrationConfig(samples=options.samples, length=context, begin_windows=True),
        recovery=RecoveryConfig(steps=options.recover) if options.recover else None,
    )
    tokens = load_tokens(options.calibration, tokenizer, split="train")
    crops = calibration_samples(tokens, samples=options.samples, length=context, seed=cfg.seed, begin=begin)
    began = time.monotonic()
    with console_reporter() as reporter:
        small = compress(source, cfg, calibration=crops, reporter=reporter)
    seconds = time.monotonic() - began
    measured = perplexity(small, stream, opened.config, context=context)
    bits = size_report(small).bits_per_weight
    print(json.dumps({"bits": bits, "compressed": measured.perplexity, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
