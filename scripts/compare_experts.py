"""Trains a small mixture of experts and a dense model of as many parameters, and compares what compression costs them.

    python scripts/compare_experts.py FOLDER --bits 2.6

Both are trained on the shipped wiki_train, with the tokenizer of scripts/train_fixture.py: a Mixtral with 4 experts, of
which a position goes through 2, and a Llama whose MLP is as large as the 4 together. FOLDER keeps the models, so that a
second call with other settings does not train again. Then both are compressed by the default recipe. The
excess of a model is the share by which its perplexity on wiki_test rises. Twenty CPU-minutes.
"""

import argparse
import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax import (
    CalibrationConfig,
    ClusterConfig,
    CompressConfig,
    calibration_samples,
    compress,
    data,
    open_model,
    size_report,
)
from cluscomp_jax.core import losses, trees
from cluscomp_jax.evaluation.perplexity import perplexity
from cluscomp_jax.models.decoder.experts import ExpertsConfig, route
from cluscomp_jax.models.llama.init import initial_params
from cluscomp_jax.models.model import Model, build_model, parameter_shapes, parse_model_config
from train_fixture import CONTEXT, train, train_tokenizer, write_folder

Params = dict[str, Any]
_BALANCE = 0.02
"""The weight of the loss that spreads positions over experts (Fedus et al. 2022, equation 4)."""
_SIZES = {
    "vocab_size": 2048,
    "hidden_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "rope_theta": 1e4,
    "eos_token_id": 0,
}
_INNER, _EXPERTS = 256, 4
MODELS: dict[str, dict[str, Any]] = {
    "experts": _SIZES
    | {"model_type": "mixtral", "intermediate_size": _INNER, "num_local_experts": _EXPERTS, "num_experts_per_tok": 2},
    "dense": _SIZES | {"model_type": "llama", "intermediate_size": _INNER * _EXPERTS},
}


def model_loss(params: Params, tokens: jax.Array, *, model: Model, mixture: ExpertsConfig | None) -> jax.Array:
    """Returns the mean negative log-likelihood of tokens[:, 1:] and, of a mixture, its balance."""
    x, balance = model.embed(params, tokens[:, :-1], dtype=jnp.float32), jnp.zeros(())
    for i in range(model.num_blocks):
        block = trees.subtree(params, f"{model.blocks_path}/{i}")
        seen: dict[str, jax.Array] = {}

        def observer(group: str, value: jax.Array, *_: Any, seen: dict[str, jax.Array] = seen) -> None:
            seen[group] = value

        x, _ = model.block(block, x, layer_type=model.layer_type(i), observer=observer)
        if mixture is not None:
            logits = seen["mlp/experts/0/input"] @ block["mlp"]["router"]["kernel"]
            balance += _balance(logits.reshape(-1, mixture.count), mixture) / model.num_blocks
    return losses.token_nll(model.head(params, x), tokens[:, 1:]).mean() + _BALANCE * balance


def _balance(logits: jax.Array, mixture: ExpertsConfig) -> jax.Array:
    chosen = jax.nn.one_hot(route(logits, mixture).chosen, mixture.count).sum(axis=1).mean(axis=0)
    probabilities = jax.nn.softmax(logits).mean(axis=0)
    return mixture.count * jnp.sum(chosen * probabilities) / mixture.per_position


def compressed(folder: Path, cfg: CompressConfig, train_tokens: np.ndarray, test: np.ndarray) -> dict[str, Any]:
    """Returns the perplexity of the model in a folder before and after compression, and its stored bits per weight."""
    opened = open_model(folder)
    cfg = dataclasses.replace(cfg, model=opened.config)
    how = cfg.calibration
    samples = calibration_samples(train_tokens, samples=how.samples, length=how.length, seed=cfg.seed)
    params = compress(opened.source, cfg, calibration=samples)
    before, after = (
        perplexity(source, test, opened.config, context=CONTEXT).perplexity for source in (opened.source, params)
    )
    return {"before": before, "after": after, "excess": after / before - 1, "bits": size_report(params).bits_per_weight}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the two models go; those that are there are not trained again")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--bits", type=float, default=2.6)
    parser.add_argument("--samples", type=int, default=64, help="of calibration, of 256 tokens each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tie-codebooks", choices=("none", "input", "block"), default="none")
    parser.add_argument("--no-tuning", action="store_true")
    options = parser.parse_args()
    tokenizer = train_tokenizer(data.text("wiki_train"))
    train_tokens, test = (
        np.asarray(tokenizer.encode(data.text(name)).ids, np.int32) for name in ("wiki_train", "wiki_test")
    )
    tied = options.tie_codebooks != "none"
    cluster = ClusterConfig(
        bits=options.bits,
        tie_codebooks=options.tie_codebooks,
        **({"mixed_precision": "none", "coding": "plain"} if tied else {}),
    )
    cfg = CompressConfig(
        cluster=cluster,
        calibration=CalibrationConfig(samples=options.samples, length=CONTEXT),
        seed=options.seed,
        tuning=None if options.no_tuning else CompressConfig().tuning,
    )
    found = {}
    for name, fields in MODELS.items():
        folder = options.folder / name
        config = parse_model_config(fields)
        if not (folder / "config.json").exists():
            model = build_model(config)
            params = train(
                initial_params(parameter_shapes(model), config.initializer_range, jax.random.key(0)),
                partial(model_loss, model=model, mixture=getattr(config, "experts", None)),
                train_tokens,
                steps=options.steps,
                batch=options.batch,
                learning_rate=options.learning_rate,
                seed=0,
            )
            write_folder(folder, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), tokenizer, config)
        found[name] = compressed(folder, cfg, train_tokens, test)
        size = sum(math.prod(shape) for shape in parameter_shapes(build_model(config)).values())
        print(f"{name}: {size} parameters, {json.dumps(found[name])}", flush=True)
    print(f"excess of the mixture over the dense one's: {found['experts']['excess'] / found['dense']['excess']:.2f}")


if __name__ == "__main__":
    main()
