import json
import logging
import threading
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoint_runs import assert_same
from coded_items import write_coded_item
from toy_checkpoint import ToyConfig, ToyRun, matrix, toy_block, toy_outer, toy_params

from cluscomp_jax.checkpoint import orbax_items
from cluscomp_jax.checkpoint.reader import describe, load_checkpoint, open_checkpoint, save_checkpoint
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.errors import InputError

CONFIG = ToyConfig()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    out = tmp_path_factory.mktemp("saved") / "out"
    save_checkpoint(out, toy_params(CONFIG), ToyRun(), provenance={"source": "toy"}, metrics={"loss": [1.0, np.nan]})
    return out


def test_what_is_saved_is_loaded_bit_for_bit(saved):
    params, config = load_checkpoint(saved)
    assert config == CONFIG
    assert_same(params, toy_params(CONFIG))
    assert isinstance(params["model"]["layers"]["0"]["attn"]["q"]["kernel"].index, np.ndarray)


def test_a_source_gives_blocks_and_rest_as_they_were_stored(saved):
    source = open_checkpoint(saved, verify=True)
    for i in range(CONFIG.num_blocks):
        assert_same(source.load_block(i), toy_block(CONFIG, i))
    assert_same(source.load_outer(), toy_outer(CONFIG))
    assert source.model_config == CONFIG
    assert source.tokenizer_path is None


def test_coded_files_of_earlier_releases_load(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_items, "write_item", write_coded_item)
    out, config = tmp_path / "coded", ToyConfig(num_blocks=1, d=64)
    params = toy_params(config)
    index = np.random.default_rng(0).normal(128, 20, (128, 64)).clip(0, 255).astype(np.uint8)
    codes = np.zeros((256, 1), np.float16)
    params["model"]["layers"]["0"]["mlp"]["down"]["kernel"] = CodebookArray(
        codes, index, matrix_shape=(128, 64), axis="out"
    )
    save_checkpoint(out, params, ToyRun(model=config))
    assert_same(load_checkpoint(out)[0], params)
    assert (out / "blocks/00000/mlp.down.kernel.index/0").stat().st_size < 0.9 * index.size
    with ocp.StandardCheckpointer() as checkpointer:
        plain = checkpointer.restore((out / "blocks/00000").absolute())
    np.testing.assert_array_equal(plain["mlp"]["down"]["kernel"]["index"], index.reshape(-1))


def test_params_on_the_device_and_integer_layer_keys_are_saved_alike(saved, tmp_path):
    params = jax.tree.map(jnp.asarray, toy_params(CONFIG))
    params["model"]["layers"] = {int(i): block for i, block in params["model"]["layers"].items()}
    save_checkpoint(tmp_path / "device", params, ToyRun())
    assert open_checkpoint(tmp_path / "device").fingerprint() == open_checkpoint(saved).fingerprint()


def test_two_saves_differ_in_orbax_time_stamps_alone(saved, tmp_path):
    save_checkpoint(tmp_path / "again", toy_params(CONFIG), ToyRun(), provenance={"source": "toy"}, metrics={"x": 1})
    first, second = describe(saved)["files"], describe(tmp_path / "again")["files"]
    assert first.keys() == second.keys()
    assert {name.rpartition("/")[2] for name in first if first[name] != second[name]} == {"_CHECKPOINT_METADATA"}


def test_the_fingerprint_follows_the_parameters(saved, tmp_path):
    params = toy_params(CONFIG)
    params["model"]["layers"]["1"]["attn"]["q"]["kernel"].index[0, 0] ^= 1
    save_checkpoint(tmp_path / "other", params, ToyRun())
    assert open_checkpoint(tmp_path / "other").fingerprint() != open_checkpoint(saved).fingerprint()


def test_the_folder_holds_what_the_format_says(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["blocks", "manifest.json", "rest"]
    assert sorted(p.name for p in (saved / "blocks").iterdir()) == ["00000", "00001", "00002"]
    assert str(saved) not in "".join(p.read_text(errors="replace") for p in saved.rglob("*") if p.is_file())


def test_the_manifest_says_what_is_stored(saved):
    fields = json.loads((saved / "manifest.json").read_text())
    assert fields == describe(saved)
    assert fields["format_version"] == 1
    assert fields["model_config"] == {"num_blocks": 3, "d": 12, "model_type": "toy_checkpoint"}
    assert fields["run_config"] == ToyRun().to_dict()
    assert fields["provenance"] == {"source": "toy"}
    assert fields["metrics"] == {"loss": [1.0, None]}
    assert fields["matrices"]["model/layers/1/attn/k/kernel"] == {
        "shape": [12, 13],
        "axis": "out",
        "group_size": 4,
        "num_codes": 257,
        "index_bits": 9,
        "codebook_dtype": "float16",
        "bits_per_weight": (9 * 12 * 4 + 16 * 257 * 4) / (12 * 13),
    }
    assert fields["tensors"]["model/norm/weight"] == {"shape": [12], "dtype": "float32"}
    totals = fields["totals"]
    assert totals["matrices"] == 12
    assert totals["tensors"] == 3 * 3 + 2
    assert totals["file_bytes"] == sum(
        p.stat().st_size for d in ("blocks", "rest") for p in (saved / d).rglob("*") if p.is_file()
    )


def test_plain_orbax_reads_an_item_and_a_plain_loop_decodes_it(saved):
    with ocp.StandardCheckpointer() as checkpointer:
        block = checkpointer.restore(saved / "blocks" / "00001")
    entry = describe(saved)["matrices"]["model/layers/1/mlp/up/kernel"]
    stored = block["mlp"]["up"]["kernel"]
    stream = int.from_bytes(stored["index"].tobytes(), "little")
    d_in, d_out = entry["shape"]
    g, bits = entry["group_size"], entry["index_bits"]
    w = np.zeros((d_in, d_out), stored["codebook"].dtype)
    for i in range(d_in):
        for o in range(d_out):
            row = i // g * d_out + o
            w[i, o] = stored["codebook"][stream >> row * bits & 2**bits - 1, i % g]
    original = toy_block(CONFIG, 1)["mlp"]["up"]["kernel"]
    expected = original.codebook[original.index].transpose(0, 2, 1).reshape(-1, d_out)[:d_in]
    np.testing.assert_array_equal(w, expected)


def test_saving_and_loading_are_silent_and_leave_no_thread(tmp_path, caplog, capfd):
    before = set(threading.enumerate())
    logger = logging.getLogger("absl")
    filters = list(logger.filters)
    save_checkpoint(tmp_path / "out", toy_params(CONFIG), ToyRun())
    load_checkpoint(tmp_path / "out")
    captured = capfd.readouterr()
    assert (captured.out, captured.err, caplog.records) == ("", "", [])
    assert logger.filters == filters
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def worn(kernel):
    """The same index into the first 100 of its codes."""
    return CodebookArray(kernel.codebook[:100], kernel.index.clip(max=150), kernel.shape, kernel.axis)


class Unchecked:
    """A source that hands out what it holds, whether it fits the model or not."""

    def __init__(self, params):
        self.params = params

    def load_block(self, i):
        return self.params["model"]["layers"][str(i)]

    def load_outer(self):
        return toy_outer(CONFIG)

    def fingerprint(self):
        return "unchecked"


def broken(change):
    params = toy_params(CONFIG)
    change(params["model"]["layers"]["1"])
    return Unchecked(params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b["mlp"].pop("up"), "model/layers/1/mlp/up/kernel: it is missing"),
        (lambda b: b.update(extra=np.zeros(3, np.float32)), "model/layers/1/extra: the model config has no such"),
        (lambda b: b["norm"].update(weight=np.zeros(5, np.float32)), r"norm/weight has shape \[5\].* says \[12\]"),
        (lambda b: b["norm"].update(weight=np.zeros(12, np.int32)), "norm/weight: dtype int32 cannot be stored"),
        (lambda b: b["norm"].update(weight=np.zeros(0, np.float32)), "norm/weight: shape .* is empty"),
        (
            lambda b: b["attn"]["q"].update(kernel=matrix(np.random.default_rng(0), (12, 16), g=4, n=9)),
            r"q/kernel has shape \[12, 16\]",
        ),
        (
            lambda b: b["attn"]["q"].update(kernel=worn(b["attn"]["q"]["kernel"])),
            "index names code .*, the codebook has 100",
        ),
    ],
)
def test_params_that_do_not_fit_the_model_are_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        save_checkpoint(tmp_path / "out", broken(change), ToyRun())
    with pytest.raises(InputError, match="an unfinished run"):
        open_checkpoint(tmp_path / "out")


def test_a_model_without_any_matrix_is_saved_too(tmp_path):
    params = toy_params(CONFIG)
    flat = trees.flatten(params)
    dense = {p: np.ones(w.shape, ml_dtypes.bfloat16) if isinstance(w, CodebookArray) else w for p, w in flat.items()}
    save_checkpoint(tmp_path / "out", trees.unflatten(dense), ToyRun())
    assert describe(tmp_path / "out")["totals"]["bits_per_weight"] is None
    assert_same(load_checkpoint(tmp_path / "out").params, trees.unflatten(dense))
