"""compress_blocks: blocks of codebases that know nothing of this one, calibrated and tuned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from small_llamas import MIXED, WINDOWED, random_params

from cluscomp_jax import (
    BlockTuningConfig,
    ClusterConfig,
    CodebookArray,
    CompressConfig,
    CompressionRule,
    InputError,
    cluster_tree,
    collect_hessians,
    compress_blocks,
    size_report,
    stack,
    unstack,
    with_codebooks,
)
from cluscomp_jax.core import trees
from cluscomp_jax.foreign_blocks import kernel_axes
from cluscomp_jax.models.foreign import ForeignModel, read_form
from cluscomp_jax.models.model import build_model

WIDTH, HEADS, HIDDEN = 16, 2, 40
CONFIG = CompressConfig(tuning=BlockTuningConfig(epochs=3, batch_size=4))


class Block(nn.Module):
    """A vision transformer's block, with kernels of three axes and biases."""

    @nn.compact
    def __call__(self, x):
        n = nn.LayerNorm(name="ln1")(x)
        q, k, v = (nn.DenseGeneral((HEADS, WIDTH // HEADS), name=name)(n) for name in "qkv")
        a = nn.dot_product_attention(q, k, v)
        x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(a)
        n = nn.LayerNorm(name="ln2")(x)
        return x + nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(HIDDEN, name="up")(n)))


BLOCK = Block()
RULES = (
    CompressionRule(pattern="[qkv]/kernel", num_codes=24, axes="d n h -> | d | n h"),
    CompressionRule(pattern="out/kernel", num_codes=24, axes="n h d -> | n h | d"),
    CompressionRule(pattern="(up|down)/kernel", num_codes=24),
)


def apply(params, x):
    return BLOCK.apply({"params": params}, x)


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def blocks_and_inputs():
    inputs = normal(8, 6, WIDTH) @ np.diag(np.linspace(2.0, 0.2, WIDTH).astype(np.float32))
    blocks = [BLOCK.init(jax.random.key(i), inputs)["params"] for i in range(2)]
    return blocks, inputs


def error_of(blocks, originals, inputs):
    got, want = inputs, inputs
    for block, original in zip(blocks, originals, strict=True):
        got, want = with_codebooks(apply)(block, got), apply(original, want)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def test_calibration_and_tuning_lower_the_error_in_the_hosts_own_block():
    blocks, inputs = blocks_and_inputs()
    blind = cluster_tree(blocks, [dataclasses.replace(r, pattern=rf"\d/{r.pattern}") for r in RULES])
    untuned, _ = compress_blocks(blocks, apply, inputs, dataclasses.replace(CONFIG, tuning=None), rules=RULES)
    tuned, summary = compress_blocks(blocks, apply, inputs, CONFIG, rules=RULES)
    errors = [error_of(found, blocks, inputs) for found in (blind, untuned, tuned)]
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < errors[1]
    assert jax.tree.structure(tuned[0]["ln1"]) == jax.tree.structure(blocks[0]["ln1"])
    assert [size.path for size in size_report(tuned).matrices][:2] == ["0/down/kernel", "0/k/kernel"]
    assert tuned[1]["q"]["kernel"].shape == (WIDTH, HEADS, WIDTH // HEADS)
    assert summary.bits_per_weight == pytest.approx(size_report(tuned).bits_per_weight)
    assert {leaf.dtype for leaf in jax.tree.leaves(tuned[0]["ln2"])} == {np.dtype(np.float32)}


def test_same_inputs_same_bytes():
    blocks, inputs = blocks_and_inputs()
    config = dataclasses.replace(CONFIG, tuning=BlockTuningConfig(epochs=1, batch_size=4))
    first, second = (compress_blocks(blocks[:1], apply, inputs, config, rules=RULES)[0] for _ in range(2))
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(one, other)


def test_input_groups_are_found_in_the_program():
    blocks, inputs = blocks_and_inputs()
    compressed, _ = compress_blocks(
        blocks[:1],
        apply,
        inputs,
        CompressConfig(tuning=None, cluster=ClusterConfig(tie_codebooks="input")),
        rules=RULES,
    )
    ties = {name: compressed[0][name]["kernel"].tied_to for name in ("q", "k", "v", "out", "up", "down")}
    assert ties == {"q": None, "k": "q/kernel", "v": "q/kernel", "out": None, "up": None, "down": None}


@pytest.mark.parametrize("config", [WINDOWED, MIXED], ids=["mistral", "qwen3"])
def test_a_decoder_seen_from_outside_shows_what_it_says_itself(config):
    model, block = build_model(config), trees.subtree(random_params(config), "model/layers/0")
    kernels = [CompressionRule(pattern=".*_proj/kernel")]
    foreign = ForeignModel(
        apply=lambda p, x: model.block(p, x, layer_type=model.layer_type(0)),
        form=read_form(block, kernel_axes(block, kernels)),
        item_shape=(5, 12),
        dtype="float32",
        depth=1,
    )
    assert list(foreign.input_groups.values()) == list(model.input_groups.values())
    x = jnp.asarray(normal(3, 5, 12))
    seen = [{}, {}]

    def observe(into):
        return lambda group, x, residual, _: into.setdefault(group, (x, residual))

    want, _ = model.block(block, x, layer_type=model.layer_type(0), observer=observe(seen[0]))
    got, _ = foreign.block(foreign.form.to_params(block), x, layer_type=None, observer=observe(seen[1]))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    for one, other in zip(seen[0].values(), seen[1].values(), strict=True):
        np.testing.assert_allclose(one[0], other[0], rtol=1e-5, atol=1e-6)
        assert (one[1] is None) == (other[1] is None)
        if one[1] is not None:
            np.testing.assert_allclose(one[1], other[1], rtol=1e-5, atol=1e-6)


def test_blocks_of_an_nnx_module_and_of_rank_two_inputs():
    class Mlp(nnx.Module):
        def __init__(self, seed):
            rngs = nnx.Rngs(seed)
            self.up, self.down = nnx.Linear(WIDTH, HIDDEN, rngs=rngs), nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

        def __call__(self, x):
            return x + self.down(nnx.gelu(self.up(x)))

    blocks = [Mlp(0), Mlp(1)]
    rules = [CompressionRule(pattern=".*/kernel", num_codes=24)]
    found, _ = compress_blocks(blocks, lambda block, x: block(x), normal(64, WIDTH), CONFIG, rules=rules)
    assert isinstance(found[0], Mlp)
    assert isinstance(found[0].up.kernel[...], CodebookArray)
    y = with_codebooks(lambda block, x: block(x))(found[0], normal(3, WIDTH))
    assert y.shape == (3, WIDTH)


def test_blocks_under_checkpoint_and_with_flags_in_their_trees():
    block = {"w": jnp.asarray(normal(WIDTH, WIDTH)), "act": jnp.tanh, "on": True, "count": jnp.arange(3)}

    def apply(params, x):
        inside = jax.checkpoint(lambda w, x: x + params["act"](x @ w))
        return inside(params["w"], x)

    rules = [CompressionRule(pattern="w", num_codes=24)]
    found, _ = compress_blocks([block], apply, normal(8, 5, WIDTH), CONFIG, rules=rules)
    assert found[0]["act"] is jnp.tanh
    assert found[0]["on"] is True
    np.testing.assert_array_equal(found[0]["count"], np.arange(3))


def test_hessians_of_any_model_through_scans():
    w, x = normal(3, WIDTH, WIDTH), normal(20, WIDTH)

    def model(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0] @ params["head"]

    params = {"w": jnp.asarray(w), "head": jnp.asarray(normal(WIDTH, 5))}
    rules = [CompressionRule(pattern="w", axes="l i o -> l | i | o", num_codes=24), CompressionRule(pattern="head")]
    found = collect_hessians(model, params, [x[:12], x[12:]], rules)
    h = x.astype(np.float64)
    for i in range(3):
        np.testing.assert_allclose(found["w"][i], h.T @ h / 20, rtol=1e-4, atol=1e-4)
        h = np.tanh(h @ w[i])
    np.testing.assert_allclose(found["head"], h.T @ h / 20, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
def test_stack_undoes_unstack(axis):
    blocks, inputs = blocks_and_inputs()
    config = dataclasses.replace(CONFIG, tuning=None)
    found, _ = compress_blocks(blocks, apply, inputs, config, rules=RULES)
    with pytest.raises(InputError, match="has no axis 1"):
        unstack(blocks[0], 1)
    kernels = [{"k": block["q"]["kernel"], "d": block["up"]["kernel"], "n": normal(4, 4)} for block in found]
    joined = stack(kernels, axis)
    assert joined["k"].shape == tuple(np.insert(kernels[0]["k"].shape, axis, 2))
    for one, other in zip(unstack(joined, axis), kernels, strict=True):
        for name in "kdn":
            np.testing.assert_array_equal(np.asarray(one[name]), np.asarray(other[name]))


def changed(**leaves):
    blocks, _ = blocks_and_inputs()
    return [{**blocks[0], **leaves}, blocks[1]]


REFUSED = {
    "a tree in place of a list": ({"blocks": blocks_and_inputs()[0][0]}, "must be a list of the blocks' parameters"),
    "another form": ({"blocks": changed(ln1={})}, "block 1 differs from block 0 in 'ln1/bias'"),
    "another shape": (
        {"blocks": changed(up={"kernel": normal(3, 3), "bias": normal(3)})},
        "'up/bias' is float32[40] in block 1",
    ),
    "another dtype": (
        {"blocks": changed(ln1={n: normal(WIDTH).astype(jnp.bfloat16) for n in ("scale", "bias")})},
        "ln1",
    ),
    "another constant": ({"blocks": [{"w": normal(4, 4), "scale": scale} for scale in (1.0, 2.0)]}, "'scale' is 2.0"),
    "no leaves": ({"blocks": [{}]}, "block 0 has no leaves"),
    "a rule too many": ({"rules": [*RULES, CompressionRule(pattern="q/kernel")]}, "decides over no leaf of a block"),
    "a function matched": ({"blocks": [{"f": jnp.tanh}], "rules": [CompressionRule(pattern="f")]}, "no array"),
    "used twice": (
        {
            "blocks": [{"w": normal(WIDTH, WIDTH)}],
            "apply": lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"],
            "rules": [CompressionRule(pattern="w", num_codes=24)],
        },
        "multiplied more than once",
    ),
    "one rule": ({"rules": RULES[0]}, "one CompressionRule; give a list"),
    "no kernel matched": ({"rules": [CompressionRule(pattern="x")]}, "no rule matches a leaf of a block"),
    "axes missing": ({"rules": [CompressionRule(pattern="q/kernel")]}, "say which are stacked"),
    "axes swapped": ({"rules": [CompressionRule(pattern="up/kernel", axes="o i -> | i | o")]}, "no product x @ W"),
    "stacked": ({"rules": [CompressionRule(pattern="q/kernel", axes="a b c -> a | b | c")]}, "stack matrices within"),
    "tokens": ({"inputs": np.zeros((8, 6), np.int32)}, "after the host's embedding: floating"),
    "a list": ({"inputs": [normal(6, WIDTH)]}, "one array [samples, ..., channels]"),
    "one sample short": ({"inputs": normal(7, 6, WIDTH)}, "positive multiple of batch_size"),
    "NaN": ({"inputs": np.full((8, 6, WIDTH), np.nan, np.float32)}, "inputs hold NaN or Inf"),
    "another output": ({"apply": lambda p, x: x[..., :3]}, "a block must give one array of its input's shape"),
    "a loss": (
        {"cfg": CompressConfig(cluster=ClusterConfig(bits=3.0, mixed_precision="per_matrix"))},
        "measures a model's loss",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.nans
def test_refused_in_one_line_before_any_work(name):
    blocks, inputs = blocks_and_inputs()
    arguments, message = REFUSED[name]
    given = {"blocks": blocks, "apply": apply, "inputs": inputs, "cfg": CONFIG, "rules": RULES} | arguments
    with pytest.raises(InputError) as error:
        compress_blocks(given["blocks"], given["apply"], given["inputs"], given["cfg"], rules=given["rules"])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def model_of(apply, block, item_shape, axes=None):
    rules = [CompressionRule(pattern=path, axes=text) for path, text in (axes or dict.fromkeys(block)).items()]
    form = read_form(block, kernel_axes(block, rules))
    return ForeignModel(apply=apply, form=form, item_shape=item_shape, dtype="float32", depth=1)


def residuals(model, block, x):
    found = {}
    model.block(
        model.form.to_params(block), x, layer_type=None, observer=lambda group, x, r, _: found.setdefault(group, (x, r))
    )
    return found


def test_a_residual_whose_rows_are_in_another_order_is_none():
    block = {"w": jnp.asarray(normal(6, 6))}
    x = jnp.asarray(normal(3, 6, 6))

    def swapped(p, x):
        return x + jnp.swapaxes(jnp.tanh(jnp.swapaxes(x, 1, 2)) @ p["w"], 1, 2)

    assert residuals(model_of(swapped, block, (6, 6)), block, x)["w"][1] is None
    plain = residuals(model_of(lambda p, x: x + jnp.tanh(x) @ p["w"], block, (6, 6)), block, x)["w"]
    np.testing.assert_array_equal(plain[1], x)
    mapped = residuals(
        model_of(lambda p, x: x + jax.vmap(jax.vmap(lambda v: p["w"].T @ v))(jnp.tanh(x)), block, (6, 6)), block, x
    )["w"]
    np.testing.assert_array_equal(mapped[1], x)


@pytest.mark.parametrize("samples", [1, 2])
def test_a_bias_is_no_residual(samples):
    block = {"w": jnp.asarray(normal(6, 6)), "b": jnp.ones(6)}
    x = jnp.asarray(normal(samples, 1, 6))
    model = model_of(lambda p, x: x + (x @ p["w"] + p["b"]), block, (1, 6), {"w": None})
    np.testing.assert_array_equal(residuals(model, block, x)["w"][1], x)


def test_kernels_that_read_an_array_in_two_ways_are_two_groups():
    block = {"a": jnp.asarray(normal(2, 8, 6)), "b": jnp.asarray(normal(8, 2, 6))}

    def apply(p, x):
        heads = x.reshape(*x.shape[:2], 2, 8)
        y = jnp.einsum("btnh,nhd->btd", heads, p["a"]) + jnp.einsum("btnh,hnd->btd", heads, p["b"])
        return jnp.concatenate([y, y, y[..., :4]], -1)

    axes = {"a": "n h d -> | n h | d", "b": "h n d -> | h n | d"}
    assert len(model_of(apply, block, (5, 16), axes).input_groups) == 2


def test_keys_in_a_block_stay_its_own():
    blocks = [{"w": jnp.asarray(normal(WIDTH, WIDTH)), "key": jax.random.key(i)} for i in range(2)]
    rules = [CompressionRule(pattern="w", num_codes=24)]
    config = dataclasses.replace(CONFIG, tuning=None)
    found, _ = compress_blocks(blocks, lambda p, x: x + x @ p["w"], normal(8, 5, WIDTH), config, rules=rules)
    assert [jax.random.key_data(block["key"]).tolist() for block in found] == [
        jax.random.key_data(block["key"]).tolist() for block in blocks
    ]


def test_equal_forms_share_their_programs():
    blocks, _ = blocks_and_inputs()
    one, other = (model_of(apply, block, (6, WIDTH), {"up/kernel": None}) for block in blocks)
    assert one == other
    assert hash(one) == hash(other)


def test_hessians_of_two_stacked_axes_come_in_the_kernels_order():
    w, x = normal(2, 2, WIDTH, WIDTH), normal(20, WIDTH)

    def model(params, x):
        def outer(h, ws):
            return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, ws)[0], None

        return jax.lax.scan(outer, x, jnp.swapaxes(params["w"], 0, 1))[0]

    rules = [CompressionRule(pattern="w", axes="l e i o -> l e | i | o", num_codes=24)]
    found = collect_hessians(model, {"w": jnp.asarray(w)}, [x], rules)["w"]
    h = x.astype(np.float64)
    for e in range(2):
        for layer in range(2):
            np.testing.assert_allclose(found[layer, e], h.T @ h / 20, rtol=1e-3, atol=1e-3)
            h = np.tanh(h @ w[layer, e])


STACK_RULE = [CompressionRule(pattern="w", axes="l i o -> l | i | o", num_codes=24)]


@pytest.mark.parametrize(
    ("apply", "batches", "rules", "message"),
    [
        (lambda p, x: x @ p["w"][0] @ p["w"][1], [normal(4, 6)], STACK_RULE, "takes single matrices out of the stack"),
        (lambda p, x: x.sum(), [normal(4, 6)], STACK_RULE, "no product x @ W of the model reads it"),
        (lambda p, x: x, [], STACK_RULE, "batches is empty"),
        (lambda p, x: x, normal(4, 6), STACK_RULE, "batches is one array"),
        (lambda p, x: x, [normal(4, 6)], STACK_RULE[0], "one CompressionRule; give a list"),
        (lambda p, x: x, [normal(4, 6)], [CompressionRule(pattern="v")], "rule 'v' decides over no leaf"),
    ],
)
def test_hessians_that_cannot_be_had(apply, batches, rules, message):
    with pytest.raises(InputError) as error:
        collect_hessians(apply, {"w": jnp.asarray(normal(2, 6, 6))}, batches, rules)
    assert message in str(error.value)


def test_what_cannot_be_stacked():
    w = normal(16, 16)
    plain, turned = (
        cluster_tree({"w": w}, [CompressionRule(pattern="w", num_codes=8, axes=axes)])
        for axes in (None, "o i -> | i | o")
    )
    for blocks, message in (
        ([plain, turned], "w differs in block 1"),
        ([], "at least one block"),
        ([{"a": 1.0}], "a is a float"),
        ([plain, {"v": w}], "block 1 has other paths"),
    ):
        with pytest.raises(InputError, match=message):
            stack(blocks)
    with pytest.raises(InputError, match="axis is -1"):
        unstack(plain, -1)
    with pytest.raises(InputError, match="w is not stacked"):
        unstack(plain)
