"""finetune: the loop, its records, and what becomes of it when it is interrupted or diverges."""

import dataclasses

import chex
import numpy as np
import pytest
from finetuning_problem import CFG, HELD_OUT, LENGTH, ROWS, STEPS, Recorder
from training_models import CONFIG, compressed_params

from cluscomp_jax import finetuning
from cluscomp_jax.config.finetune import FinetuneConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.errors import DivergedError, InputError
from cluscomp_jax.evaluation.perplexity import perplexity
from cluscomp_jax.finetuning import finetune
from cluscomp_jax.text.token_rows import ShuffledBatches, TokenRows


@pytest.fixture(scope="module")
def params():
    return compressed_params()


@pytest.fixture(scope="module")
def whole(params):
    """(result, records) of an uninterrupted run without saved states."""
    recorder = Recorder()
    return finetune(params, ROWS, CFG, evaluation=HELD_OUT, reporter=recorder), recorder.records


def test_the_loss_falls_and_only_what_was_asked_for_changes(params, whole):
    before, after = trees.flatten(params), trees.flatten(whole[0])
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        if isinstance(leaf, CodebookArray):
            np.testing.assert_array_equal(after[path].index, leaf.index)
            assert after[path].codebook.dtype == leaf.codebook.dtype
            assert not np.array_equal(after[path].codebook, leaf.codebook)
        elif path.endswith("norm/weight"):
            assert not np.array_equal(after[path], leaf)
        else:
            np.testing.assert_array_equal(after[path], leaf)
    losses = [record["loss"] for record in whole[1] if record["event"] == "step"]
    assert len(losses) == STEPS
    assert np.mean(losses[-2:]) < losses[0] - 0.1


def test_evaluations_are_the_perplexity_of_what_is_stored(params, whole):
    result, records = whole
    evaluations = [record for record in records if record["event"] == "evaluation"]
    assert [record["step"] for record in evaluations] == [0, 3, 6, STEPS]
    for tree, record in ((params, evaluations[0]), (result, evaluations[-1])):
        measured = perplexity(tree, HELD_OUT.tokens.reshape(-1), CONFIG, context=LENGTH)
        assert record["tokens"] == measured.tokens
        assert record["nll"] == pytest.approx(measured.nll, rel=1e-5)
        assert record["perplexity"] == pytest.approx(measured.perplexity, rel=1e-5)


@pytest.mark.parametrize("stop", [1, 5, STEPS])
def test_a_resumed_run_ends_in_the_bits_and_records_of_an_uninterrupted_one(params, whole, tmp_path, stop):
    with pytest.raises(KeyboardInterrupt):
        finetune(params, ROWS, CFG, evaluation=HELD_OUT, state_dir=tmp_path / "s", reporter=Recorder(stop))
    recorder = Recorder()
    resumed = finetune(params, ROWS, CFG, evaluation=HELD_OUT, state_dir=tmp_path / "s", reporter=recorder)
    chex.assert_trees_all_equal(trees.flatten(resumed), trees.flatten(whole[0]))
    assert recorder.records == whole[1]
    kept = {path.name for path in (tmp_path / "s").iterdir()}
    assert kept == {str(STEPS - 2), str(STEPS)}


def test_the_best_state_is_the_result_where_it_is_asked_for(params, tmp_path):
    """At this rate the held-out loss falls and rises again, so the best is neither the first nor the last."""
    training = dataclasses.replace(CFG.training, learning_rate=0.05, schedule="constant", steps=30)
    cfg = dataclasses.replace(CFG, training=training, result="best", evaluate_every=1)
    whole = Recorder()
    expected = finetune(params, ROWS, cfg, evaluation=HELD_OUT, reporter=whole)
    measured = {record["step"]: record["nll"] for record in whole.records if record["event"] == "evaluation"}
    best = min(measured, key=measured.get)
    assert 0 < best < 28
    found = perplexity(expected, HELD_OUT.tokens.reshape(-1), CONFIG, context=LENGTH)
    assert found.nll == pytest.approx(measured[best], rel=1e-5)
    with pytest.raises(KeyboardInterrupt):
        finetune(params, ROWS, cfg, evaluation=HELD_OUT, state_dir=tmp_path / "s", reporter=Recorder(29))
    resumed = finetune(params, ROWS, cfg, evaluation=HELD_OUT, state_dir=tmp_path / "s")
    chex.assert_trees_all_equal(trees.flatten(resumed), trees.flatten(expected))


def test_codes_that_float16_no_longer_holds_are_named_in_one_warning(params):
    """Codes of 3e-7 are subnormal in float16; once they have moved, bfloat16 holds them better."""
    small = [f"model/layers/{i}/self_attn/v_proj/kernel" for i in (0, 2)]

    def shrunk(path, leaf):
        if path not in small:
            return leaf
        return dataclasses.replace(leaf, codebook=(1e-6 * leaf.codebook.astype(np.float32)).astype(np.float16))

    recorder = Recorder()
    result = finetune(trees.map_by_path(shrunk, params), ROWS, CFG, reporter=recorder)
    assert recorder.warnings == [
        f"stored in bfloat16 after finetuning, because float16 holds them worse: {small[0]}, {small[1]}"
    ]
    coded = {path: leaf for path, leaf in trees.iterate(result) if isinstance(leaf, CodebookArray)}
    assert [path for path, leaf in coded.items() if leaf.codebook.dtype != np.float16] == small


def test_the_best_of_no_evaluation_is_refused(params):
    with pytest.raises(InputError, match="no evaluation rows to judge by"):
        finetune(params, ROWS, dataclasses.replace(CFG, result="best"))
    with pytest.raises(InputError, match="result is 'worst'"):
        dataclasses.replace(CFG, result="worst")


def test_states_of_another_run_are_refused(params, tmp_path):
    recorder = Recorder()
    finetune(params, ROWS, CFG, state_dir=tmp_path / "s", reporter=recorder)
    assert recorder.warnings == []
    with pytest.raises(InputError, match="state of another run"):
        finetune(params, ROWS, dataclasses.replace(CFG, seed=7), state_dir=tmp_path / "s")


@pytest.mark.nans
def test_a_run_that_diverges_says_where_and_keeps_the_state_before(params, tmp_path):
    rows = ShuffledBatches(ROWS, 2, CFG.seed)
    wild = dataclasses.replace(CFG, training=dataclasses.replace(CFG.training, learning_rate=1e30, warmup_fraction=0.0))
    with pytest.raises(DivergedError) as raised:
        finetune(params, ROWS, wild, state_dir=tmp_path / "s")
    assert "step 2: the loss is nan" in str(raised.value)
    assert rows.describe(1) in str(raised.value)
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["1"]
    assert "the state after step 1 is kept" in str(raised.value)


def test_a_run_that_diverges_at_once_has_no_state_to_keep(params, tmp_path):
    broken = trees.map_by_path(lambda path, leaf: leaf * np.inf if path == "model/norm/weight" else leaf, params)
    with pytest.raises(DivergedError, match=r"step 1: the loss is .*; no state before it is kept; look at"):
        finetune(broken, ROWS, CFG, state_dir=tmp_path / "s")
    assert not any((tmp_path / "s").iterdir())


def test_rows_beyond_the_context_are_refused(params):
    short = dataclasses.replace(CFG, model=dataclasses.replace(CFG.model, max_position_embeddings=LENGTH - 1))
    for rows, evaluation in ((ROWS, None), (ROWS.tokens, None), (ROWS, HELD_OUT)):
        with pytest.raises(InputError, match="exceed the model's context of"):
            finetune(params, rows, short, evaluation=evaluation)


def test_evaluation_rows_may_be_an_array(params):
    cfg = dataclasses.replace(CFG, training=dataclasses.replace(CFG.training, steps=1))
    array, examples = Recorder(), Recorder()
    finetune(params, ROWS, cfg, evaluation=HELD_OUT.tokens, reporter=array)
    finetune(params, ROWS, cfg, evaluation=HELD_OUT, reporter=examples)  # all of them scored
    assert array.records == examples.records


def test_the_caller_may_hand_out_the_batches(params, whole):
    class Own:
        fingerprint = "own"

        def batch(self, step):
            return ShuffledBatches(ROWS, 2, CFG.seed).batch(step)

        def describe(self, step):
            return f"step {step}"

    found = finetune(params, Own(), dataclasses.replace(CFG, evaluate_every=None))
    chex.assert_trees_all_equal(trees.flatten(found), trees.flatten(whole[0]))


def too_few_rows():
    class Short(ShuffledBatches):
        def batch(self, step):
            return ROWS.take(np.array([0]))

    return Short(ROWS, 2, 0)


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        (np.zeros((0, 8), np.int32), "give 1 row or more"),
        (np.zeros(8, np.int32), "integers \\[rows, length\\]"),
        (np.zeros((2, 8)), "integers \\[rows, length\\]"),
        (np.full((2, 8), 23), "token 23 is outside the vocabulary, 0 to 22"),
        (too_few_rows(), "has 1 rows; batch_size 2 x accumulation 1 needs 2"),
    ],
)
def test_rows_that_do_not_fit_are_refused_before_any_work(params, batches, text):
    recorder = Recorder()
    with pytest.raises(InputError, match=text):
        finetune(params, batches, CFG, reporter=recorder)
    assert recorder.records == []


def test_a_model_without_codebooks_is_refused_by_the_default(params):
    from cluscomp_jax.clustering.matrix import decompress

    cfg = FinetuneConfig(model=CONFIG)
    with pytest.raises(InputError, match="no codebooks yet: compress it first"):
        finetune(decompress(params), ROWS, cfg)


def test_the_fingerprint_knows_everything_the_result_depends_on(params):
    from training_models import MODEL

    from cluscomp_jax.models.source import DictSource

    source = DictSource(params, MODEL)

    def digest(cfg=CFG, examples=ROWS, evaluation=None, source=source):
        batches = finetuning.as_batches(examples, cfg, MODEL)
        return finetuning.fingerprint(source, cfg, batches, evaluation).digest

    def other_codes(_, leaf):
        return dataclasses.replace(leaf, index=leaf.index ^ 1) if isinstance(leaf, CodebookArray) else leaf

    flipped = ROWS.loss_mask.copy()
    flipped[0, 3] = False
    others = [
        digest(dataclasses.replace(CFG, seed=1)),
        digest(dataclasses.replace(CFG, training=dataclasses.replace(CFG.training, steps=9))),
        digest(examples=TokenRows(ROWS.tokens, flipped)),
        digest(examples=ROWS.take(np.array([1, 0]))),
        digest(evaluation=HELD_OUT),
        digest(source=DictSource(trees.map_by_path(other_codes, params), MODEL)),
    ]
    assert len({digest(), *others}) == 7
    assert digest() == digest()
