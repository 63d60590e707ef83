"""Tokens per second of a random compressed model in the shape of Llama-2-7B."""

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from check_card.step import Step
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.coding import Form, index_dtype, index_shape, stored_bits
from cluscomp_jax.core.trees import Params
from cluscomp_jax.inference.decoder import Decoder
from cluscomp_jax.inference.sampling import Sampling
from cluscomp_jax.models.llama.init import initial_value
from cluscomp_jax.models.model import Model, build_model, parse_model_config
from cluscomp_jax.plan.presets import PRESETS

LLAMA_2_7B: dict[str, Any] = dict(PRESETS["llama-2-7b"])
TINY: dict[str, Any] = {
    **LLAMA_2_7B,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}


@dataclasses.dataclass(frozen=True)
class RandomSource:
    """A ParamSource of random parameters, made on the device; matrices are compressed."""

    model: Model
    g: int
    num_codes: int

    def load_block(self, i: int) -> Params:
        """Returns block i."""
        kernels = {path for paths in self.model.input_groups.values() for path in paths}
        return trees.unflatten(
            {
                path: self._matrix((shape[0], shape[1]), key) if path in kernels else self._dense(path, shape, key)
                for (path, shape), key in self._keyed(self.model.block_shapes(i), i)
            }
        )

    def load_outer(self) -> Params:
        """Returns the parameters outside the blocks."""
        shapes = self._keyed(self.model.outer_shapes(), self.model.num_blocks)
        return trees.unflatten({path: self._dense(path, shape, key) for (path, shape), key in shapes})

    def fingerprint(self) -> str:
        """Returns what distinguishes this model from others."""
        return f"random {self.g} {self.num_codes}"

    def _keyed(self, shapes: dict[str, tuple[int, ...]], i: int) -> Any:
        return zip(shapes.items(), jax.random.split(jax.random.key(i), len(shapes)), strict=True)

    def _dense(self, path: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        return initial_value(path.rpartition("/")[2], shape, key, 0.02).astype(jnp.bfloat16)

    def _matrix(self, shape: tuple[int, int], key: jax.Array) -> CodebookArray:
        drawn = jax.random.randint(key, index_shape(shape, self.g, "out"), 0, self.num_codes)
        codebook = 0.02 * jax.random.normal(key, (self.num_codes, self.g))
        index = drawn.astype(index_dtype(self.num_codes))
        return CodebookArray(codebook=codebook.astype(jnp.bfloat16), index=index, matrix_shape=shape, axis="out")

    @property
    def bits(self) -> float:
        """Stored bits per weight of the matrices of a block."""
        shapes = self.model.block_shapes(0)
        matrices = [shapes[path] for paths in self.model.input_groups.values() for path in paths]
        stored = sum(stored_bits(Form((a, b), self.num_codes, self.g)) for a, b in matrices)
        return stored / sum(a * b for a, b in matrices)


def run(step: Step) -> None:
    """Measures a model of 4 bits, one of 2 bits, then the first with its matrices decoded once, where time is left."""
    model = build_model(parse_model_config(TINY if step.dry else LLAMA_2_7B))
    codes = 64 if step.dry else 65500
    took = 0.0
    for g, decode_weights in ((4, "call"), (8, "call"), (4, "once"))[: 2 if step.dry else None]:
        before = step.remaining
        if took > before and not step.dry:
            step.fact("left out", g=g, decode_weights=decode_weights, why="no time is left")
            continue
        _measure(step, RandomSource(model, g, codes), decode_weights)
        took = before - step.remaining


def _measure(step: Step, source: RandomSource, decode_weights: Any) -> None:
    prompt, long, new = (8, 32, 4) if step.dry else (16, 2048, 32)
    sizes = {"g": source.g, "codes": source.num_codes, "bits": source.bits, "decode_weights": decode_weights}
    began = time.perf_counter()
    decoder = Decoder.load(source, source.model, dtype="bfloat16", decode_weights=decode_weights)
    jax.block_until_ready((decoder.outer, decoder.blocks))  # type: ignore[no-untyped-call]
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((decoder.outer, decoder.blocks)))
    step.fact("model", **sizes, parameter_bytes=held, seconds_to_make=time.perf_counter() - began)
    rng = np.random.default_rng(0)
    vocab = source.model.config.vocab_size
    short, longer = (rng.integers(0, vocab, length).astype(np.int32) for length in (prompt, long))
    _, first = _stream(decoder, short, 2)
    steps, _ = _stream(decoder, short, new + 1)
    median = statistics.median(steps[1:])
    step.fact(
        "decoding, batch 1",
        **sizes,
        tokens_per_second=1 / median,
        median_seconds=median,
        slowest_seconds=max(steps[1:]),
        new_tokens=new,
        prompt_tokens=prompt,
        seconds_with_compilation=first,
    )
    _, first = _stream(decoder, longer, 1)
    times = [_stream(decoder, longer, 1)[1] for _ in range(1 if step.dry else 3)]
    median = statistics.median(times)
    rates = {"tokens_per_second": long / median, "seconds": median, "seconds_with_compilation": first}
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    step.fact("prefill", **sizes, tokens=long, **rates, peak_device_bytes_of_the_step=peak)


def _stream(decoder: Decoder, prompt: np.ndarray, new: int) -> tuple[list[float], float]:
    """Returns (the seconds until each token was on the host, since the one before; seconds of all)."""
    times, began = [], time.perf_counter()
    last = began
    for token in decoder.stream([prompt], new, Sampling(), jax.random.key(0)):
        np.asarray(token)
        times.append(time.perf_counter() - last)
        last = time.perf_counter()
    return times, last - began
