from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp_jax import llama
from cluscomp_jax.clustering.matrix import decompress
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.inference import decoder
from cluscomp_jax.inference.decoder import bucket, generate
from cluscomp_jax.inference.sampling import Sampling, sample
from cluscomp_jax.models.llama import LlamaConfig, RopeConfig

draw = jax.jit(sample, static_argnums=1)
VOCABULARY = 40


def make_config(**changes: Any) -> LlamaConfig:
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "initializer_range": 0.4,
    }
    return LlamaConfig(**(fields | changes))


CONFIG = make_config()


@pytest.fixture(scope="module")
def params() -> Params:
    return llama.init_params(CONFIG, jax.random.key(1))


@pytest.fixture(scope="module")
def compressed(params: Params) -> Params:
    """Random codes in place of every projection."""
    random = np.random.default_rng(0)

    def coded(path: str, leaf: Any) -> Any:
        if "_proj/kernel" not in path:
            return leaf
        d_in, d_out = leaf.shape
        index = random.integers(12, size=(d_in, -(-d_out // 3))).astype(np.uint8)
        return CodebookArray(
            codebook=random.normal(size=(12, 3)).astype(np.float16), index=index, matrix_shape=leaf.shape
        )

    return trees.map_by_path(coded, params)


def greedy_without_cache(params: Params, prompt: list[int], config: LlamaConfig, count: int) -> list[int]:
    """The whole forward pass anew for every token, over a row of fixed length whose end is not yet read."""
    tokens = np.zeros((1, 24), int)
    tokens[0, : len(prompt)] = prompt
    for end in range(len(prompt), len(prompt) + count):
        tokens[0, end] = np.argmax(np.asarray(llama.forward(params, tokens, config))[0, end - 1])
    return tokens[0, len(prompt) : len(prompt) + count].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("length", [1, 5, 16, 17])
def test_greedy_tokens_are_those_of_whole_forward_passes(params: Params, length: int) -> None:
    prompt = np.random.default_rng(length).integers(VOCABULARY, size=length).tolist()
    tokens = generate(params, prompt, CONFIG, max_new_tokens=6)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == greedy_without_cache(params, prompt, CONFIG, 6)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("length", [16, 17, 33, 48])
def test_a_long_prompt_in_pieces_gives_the_tokens_of_a_whole_one(
    monkeypatch: pytest.MonkeyPatch, params: Params, length: int, window: int | None
) -> None:
    config = CONFIG if window is None else make_config(model_type="mistral", sliding_window=window)
    prompt = np.random.default_rng(length).integers(VOCABULARY, size=(2, length))
    whole = generate(params, prompt, config, max_new_tokens=4)
    monkeypatch.setattr(decoder, "_PIECE", 16)
    np.testing.assert_array_equal(generate(params, prompt, config, max_new_tokens=4), whole)


def test_a_sliding_window_sees_no_padding() -> None:
    config = make_config(model_type="mistral", sliding_window=4)
    params = llama.init_params(config, jax.random.key(2))
    prompt = np.random.default_rng(0).integers(VOCABULARY, size=19).tolist()
    tokens = generate(params, prompt, config, max_new_tokens=5)
    assert tokens.tolist() == greedy_without_cache(params, prompt, config, 5)


def greedy_without_padding(params: Params, prompts: np.ndarray, config: LlamaConfig, count: int) -> np.ndarray:
    """A cached loop over pieces of their true lengths: the prompts, then one token of each at a time."""
    model = llama.build(config)
    step = jax.jit(model.cached_block, static_argnames="layer_type")
    caches = [model.init_cache(i, len(prompts), 48, jnp.float32) for i in range(model.num_blocks)]
    tokens, position = jnp.asarray(prompts), 0
    drawn: list[np.ndarray] = []
    while len(drawn) < count:
        x = model.embed(params, tokens, dtype=jnp.float32)
        for i in range(model.num_blocks):
            block = trees.subtree(params, f"{model.blocks_path}/{i}")
            x, caches[i] = step(block, x, caches[i], position, layer_type=model.layer_type(i))
        position += tokens.shape[1]
        tokens = jnp.argmax(model.head(params, x[:, -1:]), axis=-1)
        drawn.append(np.asarray(tokens[:, 0]))
    return np.stack(drawn, axis=1)


@pytest.mark.parametrize("length", [3, 16, 17, 23, 37])
def test_the_dynamic_rope_reads_the_length_without_padding(length: int) -> None:
    rope = RopeConfig(rope_type="dynamic", theta=100.0, factor=8.0, original_max_positions=8)
    config = make_config(rope=rope)
    params = llama.init_params(config, jax.random.key(4))
    prompts = np.random.default_rng(length).integers(VOCABULARY, size=(16, length))
    tokens = generate(params, prompts, config, max_new_tokens=6)
    first = jnp.argmax(llama.forward(params, prompts, config)[:, -1], axis=-1)
    assert tokens[:, 0].tolist() == first.tolist()
    assert tokens.tolist() == greedy_without_padding(params, prompts, config, 6).tolist()


def test_a_batch_gives_each_prompt_its_own_tokens(params: Params) -> None:
    prompts = np.random.default_rng(3).integers(VOCABULARY, size=(3, 6))
    tokens = generate(params, prompts, CONFIG, max_new_tokens=5)
    chex.assert_shape(tokens, (3, 5))
    for prompt, row in zip(prompts, tokens, strict=True):
        assert row.tolist() == generate(params, prompt, CONFIG, max_new_tokens=5).tolist()


RAGGED = {
    "full": {},
    "window": {"model_type": "mistral", "sliding_window": 4},
    "dynamic rope": {"rope": RopeConfig(rope_type="dynamic", theta=100.0, factor=8.0, original_max_positions=8)},
}


@pytest.mark.parametrize("changes", RAGGED.values(), ids=RAGGED)
def test_prompts_of_different_lengths_give_each_its_own_tokens(changes: dict[str, Any]) -> None:
    config = make_config(**changes)
    params = llama.init_params(config, jax.random.key(6))
    random = np.random.default_rng(3)
    prompts = [random.integers(VOCABULARY, size=length).tolist() for length in (3, 19, 1)]
    tokens = generate(params, prompts, config, max_new_tokens=5)
    chex.assert_shape(tokens, (3, 5))
    for prompt, row in zip(prompts, tokens, strict=True):
        assert row.tolist() == generate(params, prompt, config, max_new_tokens=5).tolist()


def test_a_long_prompt_goes_piece_by_piece(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [np.random.default_rng(3).integers(VOCABULARY, size=length).tolist() for length in (40, 33, 7)]
    whole = [
        generate(params, prompts, CONFIG, max_new_tokens=4),
        generate(params, prompts[1], CONFIG, max_new_tokens=4),
    ]
    monkeypatch.setattr(decoder, "_PIECE", 16)
    assert generate(params, prompts, CONFIG, max_new_tokens=4).tolist() == whole[0].tolist()
    assert generate(params, prompts[1], CONFIG, max_new_tokens=4).tolist() == whole[1].tolist()


def test_a_penalty_counts_what_was_seen(params: Params) -> None:
    """Next to whole forward passes, the penalty applied in NumPy."""
    prompt, found = [1, 2, 3, 2], []
    for _ in range(6):
        logits = np.asarray(llama.forward(params, np.asarray([[*prompt, *found]]), CONFIG))[0, -1].copy()
        for token in {*prompt, *found}:
            logits[token] = logits[token] / 1.7 if logits[token] > 0 else logits[token] * 1.7
        found.append(int(np.argmax(logits)))
    assert generate(params, prompt, CONFIG, max_new_tokens=6, repetition_penalty=1.7).tolist() == found
    ragged = generate(params, [[5], prompt], CONFIG, max_new_tokens=6, repetition_penalty=1.7)
    assert ragged[1].tolist() == found
    assert found != generate(params, prompt, CONFIG, max_new_tokens=6).tolist()


def test_an_int8_cache_takes_half_the_bytes_and_says_nearly_the_same() -> None:
    config = make_config(hidden_size=128, head_dim=64, initializer_range=0.1)
    params = llama.init_params(config, jax.random.key(8))
    model = llama.build(config)
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=(2, 30))

    def run(dtype: Any) -> tuple[np.ndarray, int]:
        x, size = model.embed(params, jnp.asarray(tokens), dtype=jnp.float32), 0
        for i in range(model.num_blocks):
            cache = model.init_cache(i, 2, 32, dtype)
            size += sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
            block = trees.subtree(params, f"{model.blocks_path}/{i}")
            x, _ = model.cached_block(block, x, cache, jnp.int32(0), layer_type=None)
        return np.asarray(model.head(params, x)), size

    (exact, _), (half, bf16_bytes), (coded, int8_bytes) = run(jnp.float32), run(jnp.bfloat16), run(jnp.int8)
    assert int8_bytes <= 0.53 * bf16_bytes
    spread = np.abs(exact).max()
    assert 0 < np.abs(coded - exact).max() < 0.02 * spread
    assert np.abs(half - exact).max() < 0.02 * spread


def test_an_int8_cache_generates(params: Params) -> None:
    prompts = [[1, 2, 3], [4]]
    tokens = generate(params, prompts, CONFIG, max_new_tokens=5, cache_dtype="int8")
    assert tokens[1].tolist() == generate(params, [4], CONFIG, max_new_tokens=5, cache_dtype="int8").tolist()


def test_a_row_ends_with_its_stop_token(params: Params) -> None:
    free = generate(params, [1, 2, 3], CONFIG, max_new_tokens=8)
    stop = int(free[2])
    first = free.tolist().index(stop)
    stopped = generate(params, [1, 2, 3], CONFIG, max_new_tokens=8, stop_tokens=[stop])
    assert stopped.tolist() == free[: first + 1].tolist()


def test_a_stopped_row_waits_at_its_stop_token() -> None:
    columns = [[5, 1], [2, 3], [9, 5], [4, 4]]
    drawn = (jnp.asarray(column) for column in columns)
    tokens = decoder._until_stopped(drawn, frozenset({5}), 2)
    assert tokens.tolist() == [[5, 5, 5], [1, 3, 5]]


def test_compressed_parameters_generate_what_their_decoded_form_does(compressed: Params) -> None:
    dense, dtype = decompress(compressed), "bfloat16"
    want = generate(dense, [7, 8, 9], CONFIG, max_new_tokens=6, dtype=dtype).tolist()
    for decode_weights in ("once", "call"):
        assert (
            generate(
                compressed, [7, 8, 9], CONFIG, max_new_tokens=6, dtype=dtype, decode_weights=decode_weights
            ).tolist()
            == want
        )


def test_the_same_key_gives_the_same_draws(params: Params) -> None:
    def tokens(seed: int) -> list[int]:
        drawn = generate(params, [1], CONFIG, max_new_tokens=12, temperature=3.0, key=jax.random.key(seed))
        return drawn.tolist()  # type: ignore[no-any-return]

    assert tokens(0) == tokens(0)
    assert tokens(0) != tokens(1)


def test_lengths_of_one_bucket_share_one_program(params: Params) -> None:
    generate(params, [1] * 20, CONFIG, max_new_tokens=3)
    compiled = decoder.cached_block._cache_size()
    generate(params, [1] * 23, CONFIG, max_new_tokens=9)
    assert decoder.cached_block._cache_size() == compiled


def test_buckets_are_powers_of_two() -> None:
    assert [bucket(length) for length in (1, 16, 17, 64, 65)] == [16, 16, 32, 64, 128]


@pytest.mark.parametrize(
    ("length", "new", "positions"),
    [(5, 3, 16), (17, 15, 32), (17, 16, 64), (500, 12, 512), (513, 1, 1024), (4000, 96, 4096), (33_000, 100, 33_792)],
)
def test_the_cache_holds_little_more_than_what_is_written(length: int, new: int, positions: int) -> None:
    assert decoder.cache_length(length, new) == positions


@settings(max_examples=200)
@given(st.integers(1, 200_000), st.integers(1, 20_000))
def test_the_cache_has_room_for_every_piece_of_the_prompt_and_every_new_token(length: int, new: int) -> None:
    held, piece = decoder.cache_length(length, new), decoder.prompt_width(length)
    assert held >= length + new
    assert held >= -(-length // piece) * piece
    assert held <= max(2 * (length + new), 16) if length + new <= 4096 else held < length + new + 1024 + piece


def allowed_tokens(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> set[int]:
    """Oracle in float64: the tokens that top_k, then top_p, then min_p leave, of distinct logits."""
    order = np.argsort(-logits)[:top_k]
    mass = np.exp(logits[order].astype(np.float64) / temperature)
    mass /= mass.sum()
    kept = {int(order[0])}
    for rank in range(1, len(order)):
        if top_p is not None and mass[:rank].sum() >= top_p:
            break
        if min_p is None or mass[rank] >= min_p * mass[0]:
            kept.add(int(order[rank]))
    return kept


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**31 - 1),
    limits=st.sampled_from([(3, None, None), (None, 0.6, None), (5, 0.8, 0.3), (100, 1.0, None), (None, None, 0.4)]),
)
def test_draws_lie_within_the_limits(seed: int, limits: tuple[int | None, float | None, float | None]) -> None:
    top_k, top_p, min_p = limits
    logits = np.random.default_rng(seed).permutation(12).astype(np.float32)
    drawn = draw(
        jnp.tile(logits, (64, 1)),
        Sampling(temperature=4.0, top_k=top_k, top_p=top_p, min_p=min_p),
        jax.random.key(seed),
    )
    chex.assert_shape(drawn, (64,))
    assert set(np.asarray(drawn).tolist()) <= allowed_tokens(logits, 4.0, top_k, top_p, min_p)


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits = np.array([0.0, 1.0, 2.0, -30.0], np.float32)
    drawn = draw(jnp.tile(logits, (20_000, 1)), Sampling(temperature=2.0), jax.random.key(0))
    share = np.bincount(np.asarray(drawn), minlength=4) / 20_000
    want = np.exp(logits.astype(np.float64) / 2)
    np.testing.assert_allclose(share, want / want.sum(), atol=0.015)


def test_narrowest_sampling_is_greedy() -> None:
    logits = jax.random.normal(jax.random.key(5), (8, 30))
    greedy = np.asarray(draw(logits, Sampling(), jax.random.key(0))).tolist()
    for sampling in (Sampling(temperature=1.0, top_k=1), Sampling(temperature=1.0, top_p=1e-9)):
        assert np.asarray(draw(logits, sampling, jax.random.key(1))).tolist() == greedy


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no prompt": ([], {}, "there is no prompt"),
    "empty prompt": ([[1, 2], []], {}, r"shape \(0,\)"),
    "past the context": ([1] * 2000, {"max_new_tokens": 49}, "2000 tokens, and 49 new ones .* context of 2048"),
    "fractions": ([0.5], {}, "float64"),
    "past the vocabulary": ([3, VOCABULARY], {}, f"token {VOCABULARY} .* {VOCABULARY - 1}"),
    "below the vocabulary": ([-1], {}, "token -1"),
    "no tokens": ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
    "negative temperature": ([1], {"temperature": -1.0}, "temperature is -1.0"),
    "temperature that is no number": ([1], {"temperature": float("nan")}, "temperature is nan"),
    "top_k of 0": ([1], {"top_k": 0}, "top_k is 0"),
    "min_p above 1": ([1], {"min_p": 1.5}, "min_p is 1.5"),
    "no penalty": ([1], {"repetition_penalty": 0.0}, "repetition_penalty is 0"),
    "cache dtype": ([1], {"cache_dtype": "int4"}, "cache_dtype is 'int4'"),
    "top_p of 0": ([1], {"top_p": 0.0}, "top_p is 0"),
    "top_p above 1": ([1], {"top_p": 1.5}, "top_p is 1.5"),
    "integer dtype": ([1], {"dtype": "int32"}, "dtype is int32"),
    "dtype of no one": ([1], {"dtype": "float5"}, "dtype is .float5."),
    "decode_weights": ([1], {"decode_weights": "twice"}, "decode_weights is 'twice'"),
}


@pytest.mark.parametrize(("prompt", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(params: Params, prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(params, prompt, CONFIG, **({"max_new_tokens": 2} | options))
