"""Saved training states: the newest few, another run's, and damaged ones."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

from cluscomp_jax.checkpoint.train_states import TrainStates
from cluscomp_jax.errors import InputError


def state(value):
    return {"0-2": {"up": {"codebook": jnp.full((3, 4, 2), value, jnp.float32)}}, "step": jnp.array(value, jnp.int32)}


def fill(folder, steps, keep=2, fingerprint="a"):
    with TrainStates(folder, keep=keep, fingerprint=fingerprint) as states:
        for step in steps:
            states.save(step, state(step), [{"event": "step", "step": i, "loss": i / 3} for i in range(step)])


def newest(folder, fingerprint="a"):
    with TrainStates(folder, keep=2, fingerprint=fingerprint) as states:
        return states.newest(jax.eval_shape(lambda: state(0)))


def test_an_empty_folder_holds_no_state(tmp_path):
    assert newest(tmp_path / "s") is None


def test_the_newest_states_stay_with_their_records(tmp_path):
    fill(tmp_path / "s", [1, 3, 4], keep=2)
    assert {path.name for path in (tmp_path / "s").iterdir()} == {"3", "4"}
    found, records = newest(tmp_path / "s")
    chex.assert_trees_all_equal(found, state(4))
    assert records == [{"event": "step", "step": i, "loss": i / 3} for i in range(4)]


def test_a_state_that_changes_behind_the_save_is_not_what_is_saved(tmp_path):
    donated = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0, tree), donate_argnums=0)
    with TrainStates(tmp_path / "s", keep=1, fingerprint="a") as states:
        current, records = state(5), [{"event": "step", "step": 5}]
        states.save(5, current, records)
        records += [{"event": "step", "step": 6}] * 10_000
        donated(current)
    found, recorded = newest(tmp_path / "s")
    chex.assert_trees_all_equal(found, state(5))
    assert recorded == [{"event": "step", "step": 5}]


def test_the_state_of_another_run_is_refused(tmp_path):
    fill(tmp_path / "s", [1])
    with pytest.raises(InputError, match="1: is the state of another run"):
        newest(tmp_path / "s", fingerprint="b")


def test_a_damaged_state_is_named(tmp_path):
    fill(tmp_path / "s", [7])
    damaged = [path for path in Path(tmp_path / "s" / "7" / "notes").rglob("*") if path.name == "metadata"]
    assert damaged
    damaged[0].write_text("{")
    with pytest.raises(InputError, match="7: this state cannot be read"):
        newest(tmp_path / "s")
