"""The real codebases, where they are installed: their tiny random models are checked, compressed and run again."""

import os
from functools import partial
from importlib.resources import files

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cluscomp_jax
from cluscomp_jax import llama
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.data import CalibrationConfig
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.core import pytrees
from cluscomp_jax.core.codebook import CodebookArray

VOCAB, WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 32, 16, 24, 4, 2, 8, 3
BATCH, LENGTH = 2, 16
SIZES = {"num_layers": LAYERS, "vocab_size": VOCAB, "num_heads": HEADS, "head_dim": HEAD_DIM, "num_kv_heads": KV_HEADS}
CLUSTER = ClusterConfig(rules=(CompressionRule(group_size=2, num_codes=120),), iterations=3)

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def promotion_of_the_codebases():
    """None of them casts by hand."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def randomized(params):
    """Returns the tree with every array drawn anew, so that attention depends on positions and no norm is idle."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        noise = rng.normal(0, 0.3, leaf.shape)
        return jnp.asarray(1 + noise if leaf.ndim == 1 or 1 in leaf.shape else noise, leaf.dtype)

    return jax.tree.map(draw, params)


def run_both_ways(params, config, forward):
    """Checks, compresses with calibration and tuning, and runs the host with what comes back."""
    tokens = np.random.default_rng(1).integers(0, VOCAB, (BATCH, LENGTH))
    cfg = CompressConfig(
        model=config,
        cluster=CLUSTER,
        calibration=CalibrationConfig(samples=BATCH, length=LENGTH),
        tuning=BlockTuningConfig(epochs=1, learning_rate=0.001),
    )
    got = cluscomp_jax.compress(params, cfg, calibration=tokens, check=forward)
    assert type(got) is type(params)
    codes = [leaf for _, leaf in pytrees.iterate(got) if isinstance(leaf, CodebookArray)]
    assert sum(array.stack[0] if array.stack else 1 for array in codes) == 7 * LAYERS
    dense = cluscomp_jax.decompress(got)
    assert jax.tree.structure(dense) == jax.tree.structure(params)
    before, after = (np.asarray(forward(tree, jnp.asarray(tokens))) for tree in (params, dense))
    assert 0 < np.abs(after - before).max() < 0.5 * np.abs(before).max()
    # The host's forward of the decoded tree is ours of the same tree.
    plain = CompressConfig(model=config, cluster=CLUSTER, tuning=None)
    cluscomp_jax.compress(dense, plain, check=forward)


def tunix(module, make, **changes):
    nnx = pytest.importorskip("flax.nnx")
    # The Llama of tunix 0.1.7 turns with the base 1,000,000 whatever its config says.
    config = module.ModelConfig(
        **SIZES, embed_dim=WIDTH, hidden_dim=HIDDEN, rope_theta=1_000_000, norm_eps=1e-5, **changes
    )
    graph, state = nnx.split(make(config, rngs=nnx.Rngs(0)))
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), (BATCH, LENGTH, LENGTH))

    def forward(state, ids):
        return nnx.merge(graph, state)(ids, positions, None, mask)[0]

    run_both_ways(randomized(state), llama.LlamaConfig.of(config), forward)


@pytest.mark.parametrize("tied", [False, True])
def test_llama3_of_tunix(tied):
    module = pytest.importorskip("tunix.models.llama3.model")
    tunix(module, module.Llama3, weight_tying=tied)


def test_qwen2_of_tunix():
    module = pytest.importorskip("tunix.models.qwen2.model")
    tunix(module, module.Qwen2)


def test_qwen3_of_tunix():
    module = pytest.importorskip("tunix.models.qwen3.model")
    tunix(module, module.Qwen3)


def test_qwen3_of_bonsai():
    modeling = pytest.importorskip("bonsai.models.qwen3.modeling")
    nnx = pytest.importorskip("flax.nnx")
    import dataclasses

    config = modeling.ModelCfg(
        **SIZES, emb_dim=WIDTH, mlp_dim=HIDDEN, rope_theta=1_000_000, rope_scaling_factor=1, local_rope_theta=1e4,
        norm_eps=1e-6, tie_word_embeddings=False,
    )  # fmt: skip
    sharding = dataclasses.replace(modeling.ShardingCfg.default(), act_btd=(None, None, None))
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)

    def forward(state, ids):
        with jax.set_mesh(mesh):
            cache = modeling.init_cache(LAYERS, BATCH, LENGTH, KV_HEADS, HEAD_DIM, jnp.float32)
            return nnx.merge(graph, state)(ids, jnp.ones_like(ids), 0, cache)

    with jax.set_mesh(mesh):
        graph, state = nnx.split(modeling.Qwen3(config, shd_cfg=sharding, rngs=nnx.Rngs(0)))
    run_both_ways(randomized(state), llama.LlamaConfig.of(config), forward)


@pytest.mark.parametrize("family", ["Llama3", "Mistral", "Qwen", "Qwen3"])
def test_keras_hub(family):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras_hub = pytest.importorskip("keras_hub")
    kind = {"Llama3": "llama", "Qwen": "qwen2"}.get(family, family.lower())
    # All but Qwen 3 divide the width by the heads.
    width = WIDTH if family == "Qwen3" else HEADS * HEAD_DIM
    options = {"head_dim": HEAD_DIM} if family == "Qwen3" else {}
    backbone = getattr(keras_hub.models, f"{family}Backbone")(
        vocabulary_size=VOCAB, num_layers=LAYERS, num_query_heads=HEADS, num_key_value_heads=KV_HEADS, hidden_dim=width,
        intermediate_dim=HIDDEN, rope_max_wavelength=10000, layer_norm_epsilon=1e-5, **options,
    )  # fmt: skip
    model = getattr(keras_hub.models, f"{family}CausalLM")(backbone=backbone, preprocessor=None)
    variables, rest = model.trainable_variables, [variable.value for variable in model.non_trainable_variables]
    params = randomized({variable.path: variable.value for variable in variables})
    tied = not any("reverse_embeddings" in path for path in params)

    def forward(params, ids):
        inputs = {"token_ids": ids, "padding_mask": jnp.ones_like(ids)}
        return model.stateless_call([params[variable.path] for variable in variables], rest, inputs)[0]

    config = llama.LlamaConfig(
        model_type=kind, vocab_size=VOCAB, hidden_size=width, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )  # fmt: skip
    run_both_ways(params, config, forward)


MAXTEXT = {
    "Llama 2 scanned": {"decoder_block": "llama2"},
    "Llama 3.1 scanned": {"decoder_block": "llama2", "rope_type": "llama3.1", "rope_max_timescale": 500_000},
    "Llama 3.1": {"decoder_block": "llama2", "rope_type": "llama3.1", "scan_layers": False},
    "Qwen 3 scanned": {"decoder_block": "qwen3", "use_qk_norm": True},
    "Qwen 2 scanned": {"decoder_block": "qwen2", "attention_bias": True},
    "Mistral": {"decoder_block": "mistral", "scan_layers": False},
}


@pytest.mark.parametrize("changes", MAXTEXT.values(), ids=MAXTEXT)
def test_maxtext(changes, tmp_path):
    pyconfig = pytest.importorskip("maxtext.configs.pyconfig")
    from maxtext.utils import maxtext_utils, model_creation_utils

    options = {
        "run_name": "tiny", "base_emb_dim": WIDTH, "base_num_query_heads": HEADS, "base_num_kv_heads": KV_HEADS,
        "base_mlp_dim": HIDDEN, "base_num_decoder_layers": LAYERS, "head_dim": HEAD_DIM, "vocab_size": VOCAB,
        "max_target_length": LENGTH, "max_prefill_predict_length": LENGTH, "per_device_batch_size": BATCH,
        "mlp_activations": ["silu", "linear"], "dtype": "float32", "weight_dtype": "float32",
        "matmul_precision": "highest", "attention": "dot_product", "scan_layers": True, "enable_dropout": False,
        "enable_checkpointing": False, "log_config": False, "skip_jax_distributed_system": True,
        "base_output_directory": str(tmp_path),
    }  # fmt: skip
    config = pyconfig.initialize(["", str(files("maxtext") / "configs" / "base.yml")], **(options | changes))
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    model = model_creation_utils.create_model(config, mesh)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    call = {"decoder_segment_ids": jnp.ones((BATCH, LENGTH), jnp.int32), "enable_dropout": False}
    keys = {name: jax.random.key(0) for name in ("params", "dropout", "aqt")}
    ids = jnp.zeros((BATCH, LENGTH), jnp.int32)
    with mesh:
        variables = randomized(jax.jit(partial(model.init, **call))(keys, ids, positions))

    def forward(variables, ids):
        with mesh:
            return model.apply(variables, ids, positions, **call)

    run_both_ways({"params": variables["params"]}, llama.LlamaConfig.of(config), forward)


def test_a_config_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen3Config(hidden_size=WIDTH, num_hidden_layers=LAYERS, head_dim=HEAD_DIM)
    found = llama.LlamaConfig.of(theirs)
    assert (found.model_type, found.hidden_size, found.head_dim) == ("qwen3", WIDTH, HEAD_DIM)
