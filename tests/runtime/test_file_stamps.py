"""A source whose file changes under it, of every format: half of one model and half of another must not load."""

import os

import pytest
from export_models import make_params, save
from io_models import config_fields, hf_tensors, write_gguf, write_hf

from cluscomp_jax.errors import InputError
from cluscomp_jax.export import export_checkpoint
from cluscomp_jax.io.gguf.source import GgufSource
from cluscomp_jax.io.hf.aqlm_source import AqlmSource
from cluscomp_jax.io.hf.safetensors_source import SafetensorsSource, read_config
from cluscomp_jax.models.model import build_model


def safetensors(folder):
    write_hf(folder / "hf", config_fields(), hf_tensors())
    return SafetensorsSource(folder / "hf", build_model(read_config(folder / "hf"))), folder / "hf/model.safetensors"


def gguf(folder):
    file = write_gguf(folder / "m.gguf", hf_tensors())
    return GgufSource(file), file


def aqlm(folder):
    export_checkpoint(save(folder / "small", make_params()), folder / "out", "aqlm")
    return AqlmSource(folder / "out"), folder / "out/model.safetensors"


@pytest.fixture(params=[safetensors, gguf, aqlm], ids=lambda make: make.__name__)
def opened(request, tmp_path):
    return request.param(tmp_path)


def overwrite(file):
    data = file.read_bytes()
    file.write_bytes(bytes(len(data)))
    os.utime(file, (1, 1))


def test_a_file_changed_between_two_blocks_is_refused(opened):
    source, file = opened
    source.load_block(0)
    overwrite(file)
    with pytest.raises(InputError, match=rf"{file.name} was changed since it was opened"):
        source.load_block(1)


def test_a_file_that_has_gone_is_refused(opened):
    source, file = opened
    file.unlink()
    with pytest.raises(InputError, match=rf"{file.name} has gone since it was opened"):
        source.load_outer()


@pytest.mark.parametrize("what", [overwrite, os.unlink], ids=["changed", "gone"])
def test_a_file_changed_or_gone_while_a_block_is_read_is_refused(opened, what, monkeypatch):
    source, file = opened
    load, loaded = type(source)._load, []

    def load_and_spoil(self, path):
        array = load(self, path)
        if not loaded:
            what(file)
        loaded.append(path)
        return array

    monkeypatch.setattr(type(source), "_load", load_and_spoil)
    with pytest.raises(InputError, match=rf"{file.name} (was changed|has gone) since it was opened"):
        source.load_block(0)
