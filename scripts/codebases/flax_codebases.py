"""Codebases in Flax: tunix, gemma, MaxText, bonsai and flaxdiff. Each function makes one tiny random model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from codebases.case import (
    BATCH,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    LENGTH,
    VOCAB,
    WIDTH,
    Case,
    Codebase,
    linen_case,
    nnx_case,
    rule,
    tokens,
)

SIZES = {"num_layers": LAYERS, "vocab_size": VOCAB, "num_heads": HEADS, "head_dim": HEAD_DIM, "num_kv_heads": KV_HEADS}


def tunix(module: Any, make: Any) -> Case:
    """Returns the case of a decoder of tunix: `module` has its ModelConfig, `make` is its class."""
    from flax import nnx

    config = module.ModelConfig(**SIZES, embed_dim=WIDTH, hidden_dim=HIDDEN, rope_theta=10000, norm_eps=1e-5)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), (BATCH, LENGTH, LENGTH))
    rules = (
        rule(r"layers/\d+/attn/[qkv]_proj/w", "d n h -> | d | n h"),
        rule(r"layers/\d+/attn/o_proj/w", "n h d -> | n h | d"),
        rule(r"layers/\d+/mlp/.*_proj/kernel"),
    )
    return nnx_case(make(config, rngs=nnx.Rngs(0)), rules, lambda ids: (ids, positions, None, mask))


def tunix_llama3() -> Case:
    """Llama 3 of tunix (nnx; three axes in attention)."""
    from tunix.models.llama3 import model

    return tunix(model, model.Llama3)


def tunix_qwen3() -> Case:
    """Qwen 3 of tunix (nnx; three axes in attention, norms of q and k)."""
    from tunix.models.qwen3 import model

    return tunix(model, model.Qwen3)


def gemma3() -> Case:
    """Gemma 3 of the gemma library (linen; k and v, gate and up are stacked)."""
    from gemma import gm

    kinds = gm.nn.AttentionType
    config = gm.nn.config.TransformerConfig(
        num_embed=VOCAB,
        embed_dim=WIDTH,
        hidden_dim=HIDDEN,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        num_kv_heads=KV_HEADS,
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        use_qk_norm=True,
        attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL),
        sliding_window_size=8,
        transpose_gating_einsum=True,
    )
    model = gm.nn.Gemma3_270M(config=config, dtype=jnp.float32, tokens="tokens")
    params = model.init(jax.random.key(0), tokens())["params"]
    rules = (
        rule(r"layer_\d+/attn/q_einsum/w", "n d h -> | d | n h"),
        rule(r"layer_\d+/attn/kv_einsum/w", "c k d h -> c | d | k h"),
        rule(r"layer_\d+/attn/attn_vec_einsum/w", "n h d -> | n h | d"),
        rule(r"layer_\d+/mlp/gating_einsum", "c f d -> c | d | f"),
        rule(r"layer_\d+/mlp/linear"),
    )
    return linen_case(model, params, (tokens(),), rules, lambda m, p, ids: m.apply({"params": p}, ids).logits)


def maxtext() -> Case:
    """A Llama of MaxText (boxed parameters; layers are scanned, stacked on axis 1)."""
    from importlib.resources import files

    from maxtext.configs import pyconfig
    from maxtext.utils import maxtext_utils, model_creation_utils

    config = pyconfig.initialize(
        ["", str(files("maxtext") / "configs" / "base.yml")],
        run_name="tiny",
        base_emb_dim=WIDTH,
        base_num_query_heads=HEADS,
        base_num_kv_heads=KV_HEADS,
        base_mlp_dim=HIDDEN,
        base_num_decoder_layers=3,
        head_dim=HEAD_DIM,
        vocab_size=VOCAB,
        max_target_length=LENGTH,
        max_prefill_predict_length=LENGTH,
        per_device_batch_size=BATCH,
        decoder_block="llama2",
        mlp_activations=["silu", "linear"],
        dtype="float32",
        weight_dtype="float32",
        matmul_precision="highest",
        attention="dot_product",
        scan_layers=True,
        enable_dropout=False,
        enable_checkpointing=False,
        log_config=False,
        skip_jax_distributed_system=True,
    )
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    model = model_creation_utils.create_model(config, mesh)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    options = {"decoder_segment_ids": jnp.ones((BATCH, LENGTH), jnp.int32), "enable_dropout": False}
    keys = {name: jax.random.key(0) for name in ("params", "dropout", "aqt")}
    with mesh:
        params = model.init(keys, tokens(), positions, **options)["params"]
    rules = (
        rule(r"decoder/layers/self_attention/(query|key|value)/kernel", "d l n h -> l | d | n h"),
        rule(r"decoder/layers/self_attention/out/kernel", "n l h d -> l | n h | d"),
        rule(r"decoder/layers/mlp/w./kernel", "a l b -> l | a | b"),
    )

    def call(model: Any, params: Any, ids: jax.Array) -> jax.Array:
        return model.apply({"params": params}, ids, positions, **options)

    return linen_case(model, params, (tokens(),), rules, call)


def bonsai_qwen3() -> Case:
    """Qwen 3 of bonsai (nnx; three axes in attention, a key-value cache, an Explicit mesh)."""
    from bonsai.models.qwen3 import modeling
    from flax import nnx

    config = modeling.ModelCfg(
        **SIZES,
        emb_dim=WIDTH,
        mlp_dim=HIDDEN,
        rope_theta=10000,
        rope_scaling_factor=1.0,
        local_rope_theta=10000.0,
        norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    # On a CPU the cache is not sharded, so the residual stream must not be either.
    sharding = dataclasses.replace(modeling.ShardingCfg.default(), act_btd=(None, None, None))
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        model = modeling.Qwen3(config, shd_cfg=sharding, rngs=nnx.Rngs(0))

    def arguments(ids: jax.Array) -> tuple[Any, ...]:
        cache = modeling.init_cache(LAYERS, BATCH, LENGTH, KV_HEADS, HEAD_DIM, jnp.float32)
        return ids, jnp.ones_like(ids), 0, cache

    rules = (
        rule(r"layers/\d+/attn/[qkv]_proj/w", "d n h -> | d | n h"),
        rule(r"layers/\d+/attn/o_proj/w", "n h d -> | n h | d"),
        rule(r"layers/\d+/mlp/.*_proj/kernel"),
    )
    return nnx_case(model, rules, arguments, lambda: jax.set_mesh(mesh))


def flaxdiff_dit() -> Case:
    """The diffusion transformer of flaxdiff (linen; DenseGeneral, adaptive norms)."""
    from flaxdiff.models.simple_dit import SimpleDiT

    model = SimpleDiT(patch_size=4, emb_features=WIDTH, num_layers=LAYERS, num_heads=HEADS, mlp_ratio=2)
    image = jax.random.normal(jax.random.key(1), (BATCH, 16, 16, 3))
    text = jax.random.normal(jax.random.key(2), (BATCH, 5, 32))
    inputs = (image, jnp.array([0.1, 0.5]), text)
    params = model.init(jax.random.key(0), *inputs)["params"]
    rules = (
        rule(r"dit_block_\d+/attention/to_[qkv]/kernel", "d n h -> | d | n h"),
        rule(r"dit_block_\d+/attention/to_out_0/kernel", "n h d -> | n h | d"),
        rule(r"dit_block_\d+/(mlp/.*|ada_params_module/ada_proj)/kernel"),
    )
    return linen_case(model, params, inputs, rules)


FLAX_CODEBASES = (
    Codebase("tunix-llama3", "tunix.models.llama3", "google-tunix", "pip install google-tunix", tunix_llama3),
    Codebase("tunix-qwen3", "tunix.models.qwen3", "google-tunix", "pip install google-tunix", tunix_qwen3),
    Codebase("gemma3", "gemma.gm", "gemma", "pip install gemma", gemma3),
    Codebase("maxtext", "maxtext.configs", "maxtext", "pip install -r requirements/codebases.txt", maxtext),
    Codebase(
        "bonsai-qwen3",
        "bonsai.models.qwen3",
        "jax-bonsai",
        "pip install git+https://github.com/jax-ml/bonsai",
        bonsai_qwen3,
    ),
    Codebase("flaxdiff-dit", "flaxdiff", "flaxdiff", "pip install flaxdiff", flaxdiff_dit),
)
