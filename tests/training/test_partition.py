"""How blocks are stacked for training: every block once and in order, whatever kinds there are, in few programs."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_cases import compressed, model_of_kinds
from hypothesis import given
from hypothesis import strategies as st

from cluscomp_jax.config.training import TrainingConfig
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.models.decoder import forward
from cluscomp_jax.models.source import DictSource, as_source
from cluscomp_jax.training import merge_params, split_params, split_shapes, summed_loss


def layout_of(model):
    block = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in model.block_shapes(0).items()}
    blocks = [trees.unflatten(block) for _ in range(model.num_blocks)]
    return split_shapes(blocks, {}, model, ())[2]


def in_turn(layout):
    """Returns the blocks in the order in which the sections pass through them."""
    for section in layout.sections:
        (repeats,) = {span.repeats for span in section}
        for turn in range(repeats):
            for span in section:
                size = len(span.members) // repeats
                yield from ((i, span.layer_type) for i in span.members[turn * size : (turn + 1) * size])


@given(st.lists(st.integers(0, 1), min_size=1, max_size=24))
def test_sections_pass_through_every_block_in_order(kinds):
    model = model_of_kinds(kinds)
    layout = layout_of(model)
    assert list(in_turn(layout)) == [(i, model.layer_type(i)) for i in range(len(kinds))]
    assert len({span.name for span in layout.spans}) == len(layout.spans)
    for i in range(len(kinds)):
        span, place = layout.place_of(i)
        assert span.members[place] == i


@pytest.mark.parametrize(
    ("kinds", "names"),
    [
        ([0] * 30, ["0-29"]),
        (([0] * 5 + [1]) * 10 + [0, 0], ["0-4x10", "5-5x10", "60-61"]),  # Gemma 3 27B
        ([0, 1] * 23, ["0-0x23", "1-1x23"]),  # Gemma 2 27B
        ([1] + [0] * 6, ["0-0", "1-6"]),
        ([0] * 4 + [1] * 4, ["0-3", "4-7"]),
    ],
)
def test_a_repeated_pattern_of_layers_is_one_section(kinds, names):
    assert [span.name for span in layout_of(model_of_kinds(kinds)).spans] == names


def test_a_patterned_model_has_the_loss_of_its_forward_pass_the_gradient_of_each_block_and_comes_back_in_order():
    model = model_of_kinds([0, 0, 1] * 2 + [0])
    params = compressed(model)
    settings = TrainingConfig(steps=1, batch_size=2, trainable=(".*/codebook",))
    trained, frozen, layout = split_params(DictSource(params, model), model, settings.trainable)
    assert [span.name for span in layout.spans] == ["0-1x2", "2-2x2", "6-6"]
    rng = np.random.default_rng(1)
    tokens, mask = rng.integers(0, 96, (2, 9)).astype(np.int32), np.ones((2, 9), bool)

    def with_codebooks(codebooks):
        return {path: dataclasses.replace(leaf, codebook=codebooks[path]) if path in codebooks else leaf
                for path, leaf in flat.items()}  # fmt: skip

    def expected(codebooks):
        logits = forward(trees.unflatten(with_codebooks(codebooks)), tokens, model)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], tokens[:, 1:, None], -1).sum()

    flat = trees.flatten(params)
    codebooks = {path: jnp.float32(leaf.codebook) for path, leaf in flat.items() if isinstance(leaf, CodebookArray)}
    loss = partial(summed_loss, layout=layout, settings=settings)
    found, slopes = jax.value_and_grad(loss)(trained, frozen, tokens, mask)
    wanted, slopes_wanted = jax.value_and_grad(expected)(codebooks)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for path, slope in slopes_wanted.items():
        number, _, inside = path.removeprefix("model/layers/").partition("/")
        span, place = layout.place_of(int(number))
        there = trees.flatten(slopes[span.name])[f"{inside}/codebook"][place]
        np.testing.assert_allclose(there, slope, atol=1e-4 * float(jnp.abs(slope).max()))
    source = as_source(params, model)
    for i, block in merge_params(trained, frozen, layout):
        whole = source.load_outer() if i is None else source.load_block(i)
        jax.tree.map(np.testing.assert_array_equal, block, whole)
