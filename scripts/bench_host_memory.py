"""Compresses models that differ in depth alone, and prints the memory and time that each took.

Host memory must not grow with the number of layers. The weights are random, of Llama-2-70B's shapes unless options
otherwise, written to sharded safetensors as a download would be; what costs only time is cut: iterations, tokens.

    python scripts/bench_host_memory.py --work FOLDER                      # needs some 20 GB there
    python scripts/bench_host_memory.py --work FOLDER --recipe default --num-codes 256
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from cluscomp_jax._version import versions
from cluscomp_jax.models.prefetch import PREFETCH, WRITE_BACK

GIB = 2**30


def config(options: argparse.Namespace, layers: int) -> dict[str, object]:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": options.hidden,
        "intermediate_size": options.inner,
        "num_attention_heads": options.hidden // 128,
        "num_key_value_heads": 8,
        "vocab_size": options.vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


def write_model(folder: Path, fields: dict[str, object]) -> None:
    """Writes one shard per layer and one for the rest; a layer's numbers do not depend on how many there are."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    d, inner, vocab = (int(str(fields[name])) for name in ("hidden_size", "intermediate_size", "vocab_size"))
    pairs = 128 * int(str(fields["num_key_value_heads"]))
    sides = {
        **{f"self_attn.{name}_proj": (rows, d) for name, rows in (("q", d), ("k", pairs), ("v", pairs), ("o", d))},
        "mlp.gate_proj": (inner, d),
        "mlp.up_proj": (inner, d),
        "mlp.down_proj": (d, inner),
    }
    names: dict[str, str] = {}
    for i in range(int(str(fields["num_hidden_layers"]))):
        random = np.random.default_rng(i)
        prefix = f"model.layers.{i}."
        shard = {f"{prefix}{name}.weight": normal(random, shape) for name, shape in sides.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            shard[f"{prefix}{name}.weight"] = np.ones(d, ml_dtypes.bfloat16)
        write_shard(folder, f"model-{i:05d}.safetensors", shard, names)
    random = np.random.default_rng(10**6)
    rest = {name: normal(random, (vocab, d)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    write_shard(folder, "model-rest.safetensors", {**rest, "model.norm.weight": np.ones(d, ml_dtypes.bfloat16)}, names)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def normal(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Returns weights of the deviation 1/sqrt(d_in), row by row so that float32 copies stay small."""
    array = np.empty(shape, ml_dtypes.bfloat16)
    for row in np.array_split(array, 64):
        row[:] = random.standard_normal(row.shape, np.float32) / np.sqrt(shape[1])
    return array


def write_shard(folder: Path, name: str, tensors: dict[str, np.ndarray], names: dict[str, str]) -> None:
    save_file(tensors, folder / name)
    names.update(dict.fromkeys(tensors, name))


def compress(options: argparse.Namespace, model: Path, out: Path) -> dict[str, object]:
    """Runs the command line in a process of its own and returns what it reports."""
    tokens = np.random.default_rng(0).integers(0, options.vocab, options.samples * options.length * 4, dtype=np.int32)
    np.save(options.work / "tokens.npy", tokens)
    settings = options.work / "run.toml"
    refine_rounds = "" if options.refine_rounds is None else f"refine_rounds = {options.refine_rounds}\n"
    settings.write_text(
        f'recipe = "{options.recipe}"\n[[cluster.rules]]\ngroup_size = {options.g}\nnum_codes = {options.num_codes}\n'
        f"[cluster]\niterations = {options.iterations}\n{refine_rounds}"
        f"[calibration]\nsamples = {options.samples}\nlength = {options.length}\n"
        f'[tuning]\nepochs = {options.epochs}\ncompute_dtype = "bfloat16"\nactivation_dtype = "bfloat16"\n'
    )
    command = [sys.executable, "-m", "cluscomp_jax", "compress", str(model), "--out", str(out), "--json"]
    command += ["--config", str(settings), "--calibration", str(options.work / "tokens.npy")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    fields: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return fields


def over_apart(stages: Any, seconds: float) -> float:
    """Returns the run's seconds over those of its stages one after another, reading and writing included once."""
    waiting = {"load": PREFETCH, "store": WRITE_BACK}
    apart = sum(float(s["seconds"]) for name, s in stages.items() if waiting.get(name) not in stages)
    return seconds / apart


def in_words(stages: Any) -> str:
    return ", ".join(f"{name} {s['seconds']:.0f} {s['peak_rss_bytes'] / GIB:.2f}" for name, s in stages.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--recipe", choices=["default", "paper"], default="paper")
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--inner", type=int, default=28672)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--g", type=int, default=4)
    parser.add_argument("--num-codes", type=int, default=65500)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--refine-rounds", type=int, help="refine rounds; those of the recipe unless given")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    print(f"{versions()}, {jax.devices()[0].device_kind}; {options}")
    print("| layers | peak RSS GiB | seconds | over stages apart | of its stages: seconds, peak GiB |")
    print("|---|---|---|---|---|", flush=True)
    peaks = []
    for layers in options.layers:
        model, out = options.work / f"model-{layers}", options.work / f"out-{options.recipe}-{layers}"
        if not model.exists():
            write_model(model, config(options, layers))
        fields = compress(options, model, out)
        seconds = float(str(fields["seconds"]))
        peaks.append(float(str(fields["peak_rss_bytes"])) / GIB)
        print(
            f"| {layers} | {peaks[-1]:.2f} | {seconds:.0f} | {over_apart(fields['stages'], seconds):.2f} "
            f"| {in_words(fields['stages'])} |",
            flush=True,
        )
        shutil.rmtree(out)
    print(f"largest over smallest peak: {max(peaks) / min(peaks):.3f}")


if __name__ == "__main__":
    main()
