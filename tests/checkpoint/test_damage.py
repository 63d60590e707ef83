import os
import shutil

import numpy as np
import pytest
from forgery import forge
from toy_checkpoint import ToyConfig, ToyRun, toy_params

from cluscomp_jax.checkpoint import orbax_items
from cluscomp_jax.checkpoint.reader import describe, load_checkpoint, open_checkpoint, save_checkpoint
from cluscomp_jax.errors import InputError

CONFIG = ToyConfig(num_blocks=2)


def write_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"model": 1}')


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    out = tmp_path_factory.mktemp("pristine") / "out"
    save_checkpoint(out, toy_params(CONFIG), ToyRun(CONFIG), tokenizer=write_tokenizer)
    return out


@pytest.fixture
def saved(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "out")


def files(root):
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


def test_a_flipped_byte_is_found_in_every_file(pristine, saved):
    for name in files(pristine):
        path = saved / name
        whole = path.read_bytes()
        for at in {0, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            with pytest.raises(InputError) as error:
                open_checkpoint(saved, verify=True)
            assert name in str(error.value)
            assert "\n" not in str(error.value)
        path.write_bytes(whole)
    open_checkpoint(saved, verify=True)


@pytest.mark.parametrize("name", ["blocks/00001/attn.q.kernel.index/0", "rest/model.norm.weight/0"])
def test_a_flipped_byte_is_found_when_its_item_is_read(saved, name):
    whole = (saved / name).read_bytes()
    (saved / name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    source = open_checkpoint(saved)
    source.load_block(0)
    with pytest.raises(InputError, match="does not have the SHA-256"):
        source.load_block(1) if name.startswith("blocks") else source.load_outer()
    with pytest.raises(InputError, match=name):
        load_checkpoint(saved)


def test_a_missing_or_truncated_file_is_found_without_reading_it(pristine, saved):
    for name in set(files(pristine)) - {"manifest.json"}:
        path = saved / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(InputError, match=f"{name} has {len(whole) - 1} bytes, the manifest says {len(whole)}"):
            describe(saved)
        path.unlink()
        with pytest.raises(InputError, match=f"{name} is missing"):
            describe(saved)
        path.write_bytes(whole)


@pytest.mark.parametrize("folder", ["blocks/00000", "blocks/00000/attn.q.kernel.index", "rest", "tokenizer", "blocks"])
def test_an_unlisted_file_is_not_trusted(saved, folder):
    (saved / folder / "extra.json").write_text("{}")
    with pytest.raises(InputError, match=r"extra\.json is not in the manifest"):
        open_checkpoint(saved)


def test_files_beside_the_checkpoints_own_folders_are_let_be(saved):
    (saved / "loss.png").write_bytes(b"a figure")
    open_checkpoint(saved)


def test_something_other_than_a_file_is_refused(saved):
    (saved / "tokenizer" / "tokenizer.json").unlink()
    os.mkfifo(saved / "tokenizer" / "tokenizer.json")
    with pytest.raises(InputError, match="not a regular file"):
        open_checkpoint(saved)


@pytest.mark.parametrize("size", [0, 1, 100])
def test_a_cut_manifest_is_refused(saved, size):
    text = (saved / "manifest.json").read_text()
    (saved / "manifest.json").write_text(text[:size])
    with pytest.raises(InputError, match="not the JSON"):
        describe(saved)


def test_a_manifest_that_is_no_object_or_repeats_a_key_is_refused(saved):
    for text in ("[]", '{"format_version": 1, "format_version": 1}', '{"x": NaN}', "[" * 100_000):
        (saved / "manifest.json").write_text(text)
        with pytest.raises(InputError, match=r"manifest\.json"):
            describe(saved)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(InputError, match="not a compressed checkpoint"):
        open_checkpoint(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match=r"format_version is None; this is not a checkpoint"):
        open_checkpoint(tmp_path)


def test_a_newer_format_is_refused_by_name(saved):
    forge(saved, lambda f: f.update(format_version=5))
    with pytest.raises(InputError, match=r"format version 5 is newer than 4.*install a newer cluscomp-jax"):
        open_checkpoint(saved)


def test_a_version_that_its_matrices_do_not_need_is_refused(saved):
    forge(saved, lambda f: f.update(format_version=2))
    with pytest.raises(InputError, match="format_version do not follow from the rest of the manifest"):
        open_checkpoint(saved)


Q = "model/layers/0/attn/q/kernel"
INDEX_FILE = "blocks/00000/attn.q.kernel.index/0"


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/passwd",
        "rest/../../outside",
        "rest//x",
        "rest/./x",
        "rest\\..\\x",
        "rest",
        "elsewhere/x",
        "",
        "rest/\0",
    ],
)
def test_a_path_that_leads_out_is_refused(saved, name):
    (saved.parent / "outside").write_text("secret")
    forge(saved, lambda f: f["files"].update({name: {"size": 6, "sha256": "0" * 64}}))
    with pytest.raises(InputError, match="is not in blocks"):
        open_checkpoint(saved)


def test_a_folder_that_is_a_link_is_not_followed(saved):
    (saved / "blocks" / "00001" / "link").symlink_to(saved.parent)
    with pytest.raises(InputError, match="blocks/00001/link is not in the manifest"):
        open_checkpoint(saved)
    (saved / "blocks" / "00001" / "link").unlink()
    shutil.move(saved / "rest", saved.parent / "rest")
    (saved / "rest").symlink_to(saved.parent / "rest")
    with pytest.raises(InputError, match="rest is not in the manifest and is a link"):
        open_checkpoint(saved)


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "rest/model.norm.weight/0", "blocks/00000/_METADATA"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_listed_file_that_is_a_link_is_refused(saved, name, inside):
    real = saved / "loss.png" if inside else saved.parent / "outside"
    shutil.move(saved / name, real)
    (saved / name).symlink_to(real)
    for refuse in (describe, open_checkpoint, load_checkpoint):
        with pytest.raises(InputError, match=f"{name} is a link") as error:
            refuse(saved)
        assert "\n" not in str(error.value)


def test_a_file_that_becomes_a_link_while_the_checkpoint_is_open_is_refused(saved):
    source, name = open_checkpoint(saved), "rest/model.norm.weight/0"
    shutil.move(saved / name, saved.parent / "outside")
    (saved / name).symlink_to(saved.parent / "outside")
    with pytest.raises(InputError, match=f"{name} does not have the SHA-256"):
        source.load_outer()


def test_the_checkpoint_itself_may_be_named_by_a_link(saved):
    (saved.parent / "link").symlink_to(saved)
    load_checkpoint(saved.parent / "link")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["matrices"][Q].update(shape=[12, 13]), "do not follow|shape"),
        (lambda f: f["matrices"][Q].update(shape=[12, 12, 1]), "two sizes"),
        (lambda f: f["matrices"][Q].update(shape=[12, True]), "must be integers"),
        (lambda f: f["matrices"][Q].update(shape=[12, 0]), "must be integers"),
        (lambda f: f["matrices"][Q].update(axis="up"), "one of out, in"),
        (lambda f: f["matrices"][Q].update(axis=None), "axis is None"),
        (lambda f: f["matrices"][Q].update(num_codes=65537), "from 1 to 65536"),
        (lambda f: f["matrices"][Q].update(num_codes=2.0), "must be a int"),
        (lambda f: f["matrices"][Q].update(group_size=0), "from 1 to 32"),
        (lambda f: f["matrices"][Q].update(bits_per_weight=1.0), "matrices do not follow"),
        (lambda f: f["matrices"][Q].update(codebook_dtype="object"), "one of bfloat16"),
        (lambda f: f["matrices"].update({Q: 3}), "must be an object"),
        (lambda f: f["matrices"].pop(Q), "totals|missing"),
        (lambda f: f["tensors"].update({Q: {"shape": [1], "dtype": "float32"}}), "both a matrix and a tensor"),
        (lambda f: f["totals"].update(matrix_bits=1), "totals do not follow"),
        (lambda f: f.update(files=[]), "files is"),
        (lambda f: f.pop("model_config"), "model_config is None"),
        (lambda f: f.update(surprise=1), "surprise do not follow"),
        (lambda f: f["model_config"].update(d=13), "model config says"),
        (lambda f: f["model_config"].update(num_blocks=1), "no such parameter"),
        (lambda f: f["model_config"].update(num_blocks=3), "it is missing"),
        (lambda f: f["model_config"].update(model_type="unheard-of"), "unheard-of"),
        (lambda f: f["files"][INDEX_FILE].update(size=-1), "size -1"),
        (lambda f: f["files"][INDEX_FILE].update(sha256="x"), "SHA-256 'x'"),
    ],
)
def test_a_manifest_that_contradicts_itself_or_the_model_is_refused(saved, change, message):
    forge(saved, change)
    with pytest.raises(InputError, match=message) as error:
        open_checkpoint(saved)
    assert "\n" not in str(error.value)


def test_a_wrong_size_in_the_manifest_is_refused(saved):
    def change(fields):
        fields["files"][INDEX_FILE]["size"] += 1
        fields["totals"]["file_bytes"] += 1

    forge(saved, change)
    with pytest.raises(InputError, match="the manifest says"):
        open_checkpoint(saved)


def relist(root, name):
    """Lists a file as it now is."""
    from cluscomp_jax.runtime.atomic import file_sha256

    def change(fields):
        size = (root / name).stat().st_size
        fields["totals"]["file_bytes"] += size - fields["files"][name]["size"]
        fields["files"][name] = {"size": size, "sha256": file_sha256(root / name)}

    forge(root, change)


def test_an_item_that_describes_a_huge_array_is_refused_before_it_is_allocated(saved):
    name = "blocks/00000/attn.q.kernel.codebook/.zarray"
    text = (saved / name).read_text().replace('"shape":[256,4]', '"shape":[256000000000,4]')
    (saved / name).write_text(text)
    relist(saved, name)
    with pytest.raises(InputError, match=r"attn/q/kernel/codebook is bfloat16 \[256000000000, 4\] in the item"):
        open_checkpoint(saved).load_block(0)


def test_an_item_that_orbax_cannot_read_is_one_line(saved):
    name = "blocks/00000/_METADATA"
    (saved / name).write_text("{")
    relist(saved, name)
    with pytest.raises(InputError, match="orbax cannot read this item") as error:
        open_checkpoint(saved).load_block(0)
    assert "\n" not in str(error.value)


def test_an_index_beyond_the_codebook_is_refused(saved):
    name = "blocks/00000/attn.k.kernel.index/0"
    (saved / name).write_bytes(b"\xff" * (saved / name).stat().st_size)
    relist(saved, name)
    with pytest.raises(InputError, match="index names code 511, the codebook has 257"):
        open_checkpoint(saved).load_block(0)


def test_an_item_with_other_arrays_is_refused(tmp_path):
    orbax_items.write_item(tmp_path / "item", {"a/b": np.ones(3, np.float32), "c": np.ones(2, np.uint8)})
    want = {"a/b": ((3,), np.dtype("float32")), "c": ((2,), np.dtype("uint8"))}
    assert orbax_items.read_item(tmp_path / "item", want).keys() == want.keys()
    for other in (
        {"a/b": want["a/b"]},
        {**want, "d": ((1,), np.dtype("uint8"))},
        {**want, "c": ((3,), np.dtype("uint8"))},
        {**want, "c": ((2,), np.dtype("float16"))},
    ):
        with pytest.raises(InputError, match="in the item and"):
            orbax_items.read_item(tmp_path / "item", other)
