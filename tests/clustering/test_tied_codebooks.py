"""Codebooks that several kernels of a block share: who shares, what is stored once, and what trains as one."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forgery import forge

from cluscomp_jax import llama
from cluscomp_jax.checkpoint.reader import load_checkpoint, save_checkpoint
from cluscomp_jax.clustering.matrix import size_report
from cluscomp_jax.clustering.resolve import rules_by_block
from cluscomp_jax.clustering.rules import predicted_distortion
from cluscomp_jax.clustering.tied_codebooks import fit_shared, sharing_groups
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.data import CalibrationConfig, DataConfig
from cluscomp_jax.config.finetune import FinetuneConfig
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.config.training import TrainingConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray, decode
from cluscomp_jax.core.coding import code_bits, index_shape
from cluscomp_jax.errors import InputError
from cluscomp_jax.evaluation.perplexity import perplexity
from cluscomp_jax.finetuning import finetune
from cluscomp_jax.io.open import open_model
from cluscomp_jax.models.model import build_model
from cluscomp_jax.pipeline import compress
from cluscomp_jax.text.token_rows import TokenRows
from cluscomp_jax.tuning.blockwise import join_trainable, split_trainable

CONFIG = llama.LlamaConfig(
    vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, initializer_range=0.3,
)  # fmt: skip
RULE = CompressionRule(group_size=4, num_codes=12)
RUN = CompressConfig(
    model=CONFIG,
    cluster=ClusterConfig(rules=(RULE,), iterations=4, tie_codebooks="block"),
    calibration=CalibrationConfig(samples=4, length=12),
    tuning=BlockTuningConfig(epochs=2, learning_rate=0.01),
)
TOKENS = np.random.default_rng(0).integers(0, 60, (4, 12))
ATTENTION = tuple(f"self_attn/{name}_proj/kernel" for name in "qkv")
OUT, DOWN = "self_attn/o_proj/kernel", "mlp/down_proj/kernel"
GATES = ("mlp/gate_proj/kernel", "mlp/up_proj/kernel")
INPUT_GROUPS = {"a": ATTENTION, "b": (OUT,), "c": GATES, "d": (DOWN,)}
RULES = dict.fromkeys((*ATTENTION, OUT, *GATES, DOWN), RULE)


@pytest.fixture(scope="module")
def params():
    return llama.init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def shared(params):
    return compress(params, RUN, calibration=TOKENS)


def sharing(run: CompressConfig, tie_codebooks: str, **changes) -> CompressConfig:
    return dataclasses.replace(run, cluster=dataclasses.replace(run.cluster, tie_codebooks=tie_codebooks, **changes))


def coded(params) -> dict[str, CodebookArray]:
    return {path: leaf for path, leaf in trees.flatten(params).items() if isinstance(leaf, CodebookArray)}


def owner(path: str, array: CodebookArray) -> str:
    block = "/".join(path.split("/")[:3])
    return path if array.tied_to is None else f"{block}/{array.tied_to}"


def assert_tied(params, *, codebooks: int) -> None:
    """Asserts that there are so many codebooks, and that kernels which share one hold the same."""
    arrays = coded(params)
    assert len({owner(path, array) for path, array in arrays.items()}) == codebooks
    for path, array in arrays.items():
        np.testing.assert_array_equal(array.codebook, arrays[owner(path, array)].codebook)


@pytest.mark.parametrize(
    ("tie_codebooks", "groups"),
    [("none", []), ("input", [ATTENTION, GATES]), ("block", [(*ATTENTION, OUT, *GATES, DOWN)])],
)
def test_who_shares(tie_codebooks, groups):
    assert sharing_groups(INPUT_GROUPS, RULES, tie_codebooks) == groups
    few = {ATTENTION[1]: RULE, DOWN: RULE}
    assert sharing_groups(INPUT_GROUPS, few, tie_codebooks) == ([tuple(few)] if tie_codebooks == "block" else [])


def test_kernels_that_are_cut_differently_do_not_share(params):
    fine = dataclasses.replace(RULE, num_codes=20)
    assert sharing_groups(INPUT_GROUPS, RULES | {ATTENTION[2]: fine}, "input") == [ATTENTION[:2], GATES]
    mixed_precision = RULES | dict.fromkeys(GATES, fine)
    assert sharing_groups(INPUT_GROUPS, mixed_precision, "block") == [(*ATTENTION, OUT, DOWN), GATES]
    by_path = dataclasses.replace(fine, pattern=r".*/mlp/(gate|up).*kernel")
    compressed = compress(params, sharing(dataclasses.replace(RUN, tuning=None), "block", rules=(by_path, RULE)))
    assert_tied(compressed, codebooks=4)


@pytest.mark.parametrize(("tie_codebooks", "per_block"), [("input", 4), ("block", 1)])
@pytest.mark.parametrize("how", ["tuned", "clustered", "blind", "in"])
def test_all_of_a_group_have_one_codebook_and_it_counts_once(params, tie_codebooks, per_block, how):
    run = sharing(RUN, tie_codebooks)
    if how != "tuned":
        run = dataclasses.replace(run, tuning=None)
    if how == "in":
        alone = {"weighted": False, "error_feedback": False, "rules": (dataclasses.replace(RULE, axis="in"),)}
        run = sharing(run, tie_codebooks, **alone)
    compressed = compress(params, run, calibration=None if how == "blind" else TOKENS)
    assert_tied(compressed, codebooks=2 * per_block)
    arrays = coded(compressed)
    entries = sum(array.index.size for array in arrays.values())
    assert size_report(compressed).bits_per_weight == pytest.approx(
        (4 * entries + 2 * per_block * 12 * 4 * 16) / sum(math.prod(array.shape) for array in arrays.values())
    )


def test_a_budget_counts_a_shared_codebook_once():
    model, errors = build_model(CONFIG), []
    for tie_codebooks, codebooks in (("none", 7), ("input", 4), ("block", 1)):
        rule = rules_by_block(model, sharing(RUN, tie_codebooks, bits=3.0, coding="plain"))[0][DOWN]
        shapes = [model.block_shapes(0)[path] for path in RULES]
        entries = sum(math.prod(index_shape(shape, rule.group_size, "out")) for shape in shapes)
        bits = code_bits(rule.num_codes) * entries + codebooks * 16 * rule.group_size * rule.num_codes
        assert bits / sum(map(math.prod, shapes)) <= 3.0
        errors.append(predicted_distortion(rule.group_size, rule.num_codes))
    assert errors[0] >= errors[1] >= errors[2] < errors[0]


def test_no_kernel_is_lost_beside_larger_numbers():
    rng = np.random.default_rng(1)
    kernels = {"large": 1000 * rng.standard_normal((32, 64)), "small": rng.standard_normal((32, 64))}
    settings = ClusterConfig(iterations=10)
    rule = CompressionRule(group_size=2, num_codes=128)
    starts = fit_shared(kernels, rule, settings, key=jax.random.key(0), channel_weights={})
    for path, start in starts.items():
        decoded = start.codebook.astype(np.float32)[start.codes].reshape(32, 64)
        assert np.square(decoded - kernels[path]).sum() < 0.2 * np.square(kernels[path]).sum()
    assert [start.owner for start in starts.values()] == [None, "large"]


def test_the_gradient_of_a_shared_codebook_is_the_sum_of_its_kernels(shared):
    block = shared["model"]["layers"]["0"]
    trained, outer = split_trainable(block, norms=False)
    assert list(trained) == [ATTENTION[0]]
    weights = {
        path: jax.random.normal(jax.random.key(i), array.shape) for i, (path, array) in enumerate(coded(block).items())
    }

    def loss(trained):
        flat = trees.flatten(join_trainable(trained, outer))
        return sum(jnp.vdot(weights[path], decode(flat[path])) for path in weights)

    gradient = np.asarray(
        jax.grad(loss)({path: jnp.asarray(v, jnp.float32) for path, v in trained.items()})[ATTENTION[0]]
    )
    expected = np.zeros_like(gradient)
    for path, array in coded(block).items():
        vectors = np.asarray(weights[path]).reshape(-1, 4)
        np.add.at(expected, np.asarray(array.index).reshape(-1), vectors)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def test_finetuning_trains_it_as_one(shared):
    settings = TrainingConfig(steps=3, learning_rate=0.05, batch_size=2)
    cfg = FinetuneConfig(model=CONFIG, data=DataConfig(length=12), training=settings)
    tuned = finetune(shared, TokenRows(TOKENS, np.ones(TOKENS.shape, bool)), cfg)
    assert_tied(tuned, codebooks=2)
    path = f"model/layers/0/{DOWN}"
    assert not np.array_equal(coded(tuned)[path].codebook, coded(shared)[path].codebook)
    np.testing.assert_array_equal(coded(tuned)[path].index, coded(shared)[path].index)


def test_it_is_stored_once_and_comes_back(shared, params, tmp_path):
    save_checkpoint(tmp_path / "shared", shared, RUN)
    back, _ = load_checkpoint(tmp_path / "shared")
    for path, array in coded(shared).items():
        assert coded(back)[path].tied_to == array.tied_to
        np.testing.assert_array_equal(coded(back)[path].index, array.index)
    assert_tied(back, codebooks=2)
    manifest = json.loads((tmp_path / "shared/manifest.json").read_text())
    assert manifest["format_version"] == 2
    assert manifest["matrices"][f"model/layers/1/{DOWN}"]["codebook_of"] == ATTENTION[0]
    assert manifest["totals"]["bits_per_weight"] == size_report(shared).bits_per_weight
    stored = {name.split("/")[2] for name in manifest["files"] if name.startswith("blocks/00001/")}
    assert [name for name in stored if name.endswith(".codebook")] == ["self_attn.q_proj.kernel.codebook"]
    save_checkpoint(tmp_path / "own", compress(params, sharing(RUN, "none"), calibration=TOKENS), RUN)
    assert json.loads((tmp_path / "own/manifest.json").read_text())["format_version"] == 1


def test_codebooks_that_are_said_to_be_one_and_are_not_are_refused(shared, tmp_path):
    flat = trees.flatten(shared)
    path = f"model/layers/1/{DOWN}"
    flat[path] = dataclasses.replace(flat[path], codebook=flat[path].codebook + 1)
    with pytest.raises(InputError, match=rf"codebook of {DOWN} is not that of {ATTENTION[0]}"):
        save_checkpoint(tmp_path / "out", trees.unflatten(flat), RUN)
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("owner", [DOWN, OUT, "mlp/none/kernel", 7, "input_layernorm/weight"])
def test_a_manifest_that_names_no_stored_codebook_is_refused(shared, tmp_path, owner):
    save_checkpoint(tmp_path / "out", shared, RUN)
    forge(tmp_path / "out", lambda f: f["matrices"][f"model/layers/1/{DOWN}"].update({"codebook_of": owner}))
    expected = (
        "codebook_of is 7; it must be a str" if owner == 7 else f"has the codebook of {owner!r}, which stores none"
    )
    with pytest.raises(InputError, match=expected):
        load_checkpoint(tmp_path / "out")


@pytest.mark.long
def test_sharing_buys_quality_on_held_out_text(tiny_model, tiny_test_tokens):
    """At 4.1 bits, where codebooks are large next to kernels as small as these; weights alone are clustered."""
    opened, losses = open_model(tiny_model), []
    for tie_codebooks in ("none", "block"):
        cluster = ClusterConfig(bits=4.1, coding="plain", tie_codebooks=tie_codebooks, iterations=8)
        compressed = compress(opened.source, CompressConfig(model=opened.config, cluster=cluster, tuning=None))
        assert size_report(compressed).bits_per_weight <= 4.1
        losses.append(np.log(perplexity(compressed, tiny_test_tokens[:8192], opened.config, context=256).perplexity))
    original = np.log(perplexity(opened.source, tiny_test_tokens[:8192], opened.config, context=256).perplexity)
    assert losses[1] - original < 0.7 * (losses[0] - original)
