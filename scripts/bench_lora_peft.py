"""LoRA by PyTorch and peft on the 3-bit copy of `bench_lora.py`: a check on the figures that script gets in JAX.

    pip install ".[cli,parity]" peft
    python scripts/make_instructions.py --out data
    python scripts/bench_lora_peft.py --data data/sentences-train.jsonl --test data/sentences-test.jsonl

The same copy (3 bits, groups of 64), rows, order, schedule, clipping and AdamW; adapters on the query and value
projections as peft draws them, no dropout, alpha equal to the rank. A line for each rate.
"""

import argparse
import time
from typing import Any

import jax
import numpy as np
import peft
import torch
import transformers

import bench_lora
from cluscomp_jax.cli.demo_model import find_model
from cluscomp_jax.config.finetune import FinetuneConfig
from cluscomp_jax.config.training import TrainingConfig
from cluscomp_jax.core import trees
from cluscomp_jax.io.open import OpenedModel, open_model
from cluscomp_jax.models.llama.hf_config import to_hf_dict
from cluscomp_jax.models.source import load_all
from cluscomp_jax.runtime.reporter import to_json
from cluscomp_jax.text.token_rows import ShuffledBatches, TokenRows
from cluscomp_jax.tuning.optimizer import make_schedule

SEED = FinetuneConfig().seed
IGNORED = -100


def torch_model(opened: OpenedModel) -> Any:
    """Returns the 3-bit copy of a Llama with tied embeddings as transformers has it, in float32."""
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(to_hf_dict(opened.config)))
    copy = bench_lora.three_bits(load_all(opened.source, opened.model), opened.model)
    state = {}
    for path, leaf in trees.flatten(copy).items():
        array = torch.tensor(np.asarray(leaf, np.float32))
        name = path.replace("/", ".").replace(".embedding", ".weight").replace(".kernel", ".weight")
        state[name] = array.T if path.endswith("/kernel") else array
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    network.load_state_dict(state)
    return network


def summed_loss(network: Any, rows: TokenRows) -> tuple[Any, int]:
    """Returns the summed cross entropy of the scored tokens, and how many they are."""
    tokens = torch.tensor(rows.tokens, dtype=torch.long)
    targets = torch.where(torch.tensor(rows.loss_mask), tokens, IGNORED)[:, 1:].flatten()
    logits = network(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return loss, int((targets != IGNORED).sum())


@torch.no_grad()
def mean_loss(network: Any, rows: TokenRows) -> float:
    parts = [summed_loss(network, rows.take(np.arange(i, i + 1))) for i in range(len(rows))]
    return float(sum(float(loss) for loss, _ in parts) / sum(count for _, count in parts))


def train(opened: OpenedModel, rows: TokenRows, test: TokenRows, rank: int, settings: TrainingConfig) -> dict[str, Any]:
    """Returns what one rate came to."""
    torch.manual_seed(SEED)
    adapters = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    network = peft.get_peft_model(torch_model(opened), adapters)
    trained = [p for p in network.parameters() if p.requires_grad]
    began, before = time.perf_counter(), mean_loss(network, test)
    optimizer = torch.optim.AdamW(trained, weight_decay=settings.weight_decay)
    schedule = make_schedule(settings, settings.steps)
    batches = ShuffledBatches(rows, settings.batch_size, SEED)
    for step in range(settings.steps):
        optimizer.param_groups[0]["lr"] = float(schedule(step))
        loss, count = summed_loss(network, batches.batch(step))
        optimizer.zero_grad()
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm)
        optimizer.step()
    numbers = {"trained": sum(p.numel() for p in trained), "rate": settings.learning_rate, "before": before}
    return {**numbers, "after": mean_loss(network, test), "seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    bench_lora.add_common_arguments(parser)
    options = parser.parse_args()
    opened = open_model(find_model())
    rows, test = (bench_lora.rows(opened, path, options) for path in (options.data, options.test))
    test = test.take(np.arange(min(options.test_rows, len(test))))
    print(f"torch {torch.__version__}, peft {peft.__version__}, jax {jax.__version__}")
    for rate in options.lora_rates:
        settings = TrainingConfig(steps=options.steps, batch_size=options.batch_size, learning_rate=rate)
        numbers = train(opened, rows, test, options.rank, settings)
        print(to_json({"method": "LoRA by peft, int3 group 64", **numbers}), flush=True)


if __name__ == "__main__":
    main()
