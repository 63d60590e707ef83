"""Reading ahead and writing later: order, errors, and that waiting is all that changes."""

import threading
import time

import chex
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluscomp_jax import compression_run, llama, pipeline
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.data import CalibrationConfig
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.config.tuning import BlockTuningConfig
from cluscomp_jax.models.model import build_model
from cluscomp_jax.models.prefetch import PREFETCH, WRITE_BACK, BlockReader, BlockWriter
from cluscomp_jax.models.source import DictSink, DictSource
from cluscomp_jax.runtime.timing import StageTimer


class Blocks:
    """A source of numbered blocks that notes which are asked for, and can fail at one."""

    def __init__(self, fail_at: int | None = None):
        self.fail_at, self.asked = fail_at, []

    def load_block(self, i):
        self.asked.append(i)
        if i == self.fail_at:
            raise FileNotFoundError(f"block {i} has gone")
        return {"number": np.array(i)}

    def load_outer(self):
        return {}

    def fingerprint(self):
        return ""


@settings(max_examples=20)
@given(st.integers(1, 12))
def test_every_block_is_read_once_and_in_order(count: int) -> None:
    source = Blocks()
    with BlockReader(source, count, StageTimer()) as reader:
        assert [int(reader.take(i)["number"]) for i in range(count)] == list(range(count))
    assert source.asked == list(range(count))


def test_the_next_block_is_read_while_one_is_at_work_once_told_and_no_further() -> None:
    source = Blocks()
    with BlockReader(source, 5, StageTimer()) as reader:
        reader.take(0)
        time.sleep(0.05)
        assert source.asked == [0]
        reader.read_next()
        reader.read_next()
        until = time.monotonic() + 10
        while source.asked != [0, 1] and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.05)
        assert source.asked == [0, 1]


def test_an_error_of_reading_comes_with_the_block_it_belongs_to() -> None:
    with BlockReader(Blocks(fail_at=1), 3, StageTimer()) as reader:
        reader.take(0)
        with pytest.raises(FileNotFoundError, match="block 1 has gone"):
            reader.take(1)


def test_writes_follow_one_another_and_the_last_has_ended_when_it_is_left() -> None:
    written, clock = [], StageTimer()

    def write(i: int) -> None:
        time.sleep(0.01)
        written.append((i, threading.current_thread() is threading.main_thread()))

    with BlockWriter(clock) as writer:
        for i in range(4):
            writer.put(lambda i=i: write(i))
            assert len(written) >= i  # at most one is still to be written
    assert written == [(i, False) for i in range(4)]
    assert clock.to_dict()[WRITE_BACK]["seconds"] >= 0.04


def test_an_error_of_writing_stops_the_next_write_and_the_work() -> None:
    written = []

    def fail() -> None:
        raise OSError("the disk is full")

    with BlockWriter(StageTimer()) as writer:
        writer.put(fail)
        with pytest.raises(OSError, match="the disk is full"):
            writer.put(lambda: written.append(1))
        writer.wait()
    assert written == []


def test_work_that_fails_still_waits_for_the_write_under_way() -> None:
    written = []

    def work() -> None:
        with BlockWriter(StageTimer()) as writer:
            writer.put(lambda: (time.sleep(0.05), written.append(1)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert written == [1]


class InTurn:
    """Reads and writes in the thread of the work, as if there were no other."""

    def __init__(self, source, _count=None, _clock=None, _first=0):
        self.source = source

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def take(self, i):
        return self.source.load_block(i)

    def read_next(self):
        pass

    def put(self, write):
        write()

    def wait(self):
        pass


@pytest.mark.long
def test_bytes_and_records_are_those_of_reading_and_writing_in_turn(tmp_path, monkeypatch) -> None:
    config = llama.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=0.3,
    )  # fmt: skip
    cfg = CompressConfig(
        model=config,
        cluster=ClusterConfig(rules=(CompressionRule(group_size=4, num_codes=12),), iterations=2),
        calibration=CalibrationConfig(samples=2, length=8),
        tuning=BlockTuningConfig(epochs=1),
    )
    model, tokens = build_model(config), np.random.default_rng(0).integers(0, 40, (2, 8))
    source = DictSource(llama.init_params(config, jax.random.key(0)), model)

    def run(name):
        sink = DictSink()
        done = pipeline.compress_stream(source, sink, cfg, calibration=tokens, work_dir=tmp_path / name)
        return sink.params(model), done

    concurrent, summary = run("concurrent")
    assert {PREFETCH, WRITE_BACK} <= summary.stages.keys()
    monkeypatch.setattr(compression_run, "BlockReader", InTurn)
    monkeypatch.setattr(compression_run, "BlockWriter", InTurn)
    in_turn, other = run("in turn")
    chex.assert_trees_all_equal(concurrent, in_turn)
    untimed = [
        [{key: value for key, value in matrix.items() if key != "seconds"} for matrix in done.matrices]
        for done in (summary, other)
    ]
    assert untimed[0] == untimed[1]
