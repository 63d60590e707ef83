import os

import chex
import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from io_models import HEAD_DIM, LAYERS, VOCAB, hf_tensors, write_gguf

from cluscomp_jax.core import trees
from cluscomp_jax.errors import InputError
from cluscomp_jax.io.gguf.config import shortest_decimal
from cluscomp_jax.io.gguf.source import GgufSource
from cluscomp_jax.io.tokenizer.gguf import build_tokenizer
from cluscomp_jax.models.source import ParamSource, load_all

KINDS = gguf.GGMLQuantizationType
QUERY = "blk.1.attn_q.weight"


def flax_of(tensors):
    """{Flax path: array} of Hugging Face tensors, in words of its own."""
    flat = {}
    for name, array in tensors.items():
        module, leaf = name.rsplit(".", 1)
        if leaf == "weight" and array.ndim == 2:
            leaf = "embedding" if module.endswith("embed_tokens") else "kernel"
        flat[f"{module}.{leaf}".replace(".", "/")] = array.T if leaf == "kernel" else array
    return flat


@pytest.mark.parametrize(
    ("arch", "options"),
    [("llama", {}), ("llama", {"tied": True}), ("llama", {"attention_bias": True}), ("qwen2", {}), ("qwen3", {})],
)
def test_every_tensor_arrives_where_hugging_face_has_it(tmp_path, arch, options):
    tensors = hf_tensors(arch, **options)
    source = GgufSource(write_gguf(tmp_path / "m.gguf", tensors, arch=arch), dtype=np.float32)
    assert isinstance(source, ParamSource)
    assert source.model_config.model_type == arch
    assert source.model_config.tie_word_embeddings == options.get("tied", False)
    chex.assert_trees_all_equal(trees.flatten(load_all(source, source.model)), flax_of(tensors))


@pytest.mark.parametrize("kind", [KINDS.Q4_0, KINDS.Q4_1, KINDS.Q5_0, KINDS.Q5_1, KINDS.Q8_0, KINDS.F16, KINDS.BF16])
def test_quantised_matrices_come_back_within_their_step(tmp_path, kind):
    tensors = hf_tensors()
    source = GgufSource(write_gguf(tmp_path / "m.gguf", tensors, kind=kind), dtype=np.float32)
    step = {KINDS.Q4_0: 2.2, KINDS.Q4_1: 1.0, KINDS.Q5_0: 1.1, KINDS.Q5_1: 0.5, KINDS.Q8_0: 0.07}.get(kind, 0.04)
    got = trees.flatten(load_all(source, source.model))
    for path, want in flax_of(tensors).items():
        tolerance = step * np.abs(want).max() / 4 if want.ndim == 2 else 0
        np.testing.assert_allclose(got[path], want, atol=tolerance, err_msg=path)


def test_values_of_a_q8_block_are_its_scale_times_its_integers(tmp_path):
    tensors = hf_tensors()
    column = (np.arange(64) % 255 - 127).astype(np.float32)
    tensors["model.layers.0.mlp.up_proj.weight"][:] = column * 0.5
    source = GgufSource(write_gguf(tmp_path / "m.gguf", tensors, kind=KINDS.Q8_0), dtype=np.float32)
    kernel = source.load_block(0)["mlp"]["up_proj"]["kernel"]
    for start in (0, 32):
        block = column[start : start + 32] * 0.5
        scale = np.float32(np.float16(np.abs(block).max() / 127))
        np.testing.assert_allclose(kernel[start : start + 32, 0], np.round(block / scale) * scale, atol=scale * 0.51)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(KINDS.F32, np.float32), (KINDS.F16, np.float16), (KINDS.BF16, ml_dtypes.bfloat16)]
)
def test_by_default_the_dtype_is_that_of_the_matrices(tmp_path, kind, dtype):
    tensors = hf_tensors()
    source = GgufSource(write_gguf(tmp_path / "m.gguf", tensors, kind=kind))
    for path, array in trees.flatten(load_all(source, source.model)).items():
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, flax_of(tensors)[path].astype(dtype))


def test_quantised_matrices_arrive_in_bfloat16_rounded_to_nearest(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", hf_tensors(), kind=KINDS.Q8_0)
    source, exact = GgufSource(file), GgufSource(file, dtype=np.float32)
    expected = trees.flatten(load_all(exact, exact.model))
    for path, array in trees.flatten(load_all(source, source.model)).items():
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array, expected[path].astype(ml_dtypes.bfloat16))


WRONG = ["x", "", [], [1], ["x"], [[1]], None, True, 1.5, -1, 0, 2**31, float("nan"), float("inf")]
KEYS = [
    *(f"tokenizer.ggml.{name}" for name in (
        "model", "pre", "tokens", "scores", "token_type", "merges", "bos_token_id", "eos_token_id", "eot_token_id",
        "unknown_token_id", "padding_token_id", "add_bos_token", "add_eos_token", "add_space_prefix",
    )),
    "tokenizer.chat_template", "general.architecture", "split.count", "llama.block_count", "llama.context_length",
    "llama.embedding_length", "llama.feed_forward_length", "llama.attention.head_count",
    "llama.attention.head_count_kv", "llama.attention.key_length", "llama.attention.value_length",
    "llama.attention.layer_norm_rms_epsilon", "llama.attention.sliding_window", "llama.rope.dimension_count",
    "llama.rope.freq_base", "llama.rope.scaling.type", "llama.rope.scaling.factor",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_a_key_of_another_type_is_served_or_refused_in_one_line(tmp_path, monkeypatch, key):
    path = write_gguf(tmp_path / "m.gguf", hf_tensors(), metadata=add_tokenizer)
    contents, refused = gguf.ReaderField.contents, []
    for value in WRONG:
        with monkeypatch.context() as patch:
            patch.setattr(
                gguf.ReaderField, "contents", lambda field, v=value: v if field.name == key else contents(field)
            )
            try:
                source = GgufSource(path)
                build_tokenizer(source.metadata, where=str(path))
            except InputError as error:
                refused.append(str(error))
    assert len(refused) >= 6
    assert all(line.startswith(str(path)) and "\n" not in line for line in refused)


def add_tokenizer(writer):
    """Writes every key that is read and has no value yet."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(VOCAB - 3))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_token_types([2, 3, 3] + [6] * (VOCAB - 3))
    writer.add_token_merges(["< s"])
    for name in ("bos", "eos", "eot", "unk", "pad"):
        getattr(writer, f"add_{name}_token_id")(1)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    writer.add_chat_template("x")
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    writer.add_rope_scaling_factor(1.0)
    writer.add_sliding_window(0)
    writer.add_uint16("split.count", 1)


def test_tokens_that_end_a_turn_end_a_text_too(tmp_path):
    def metadata(writer):
        add_tokenizer(writer)
        writer.add_uint32("tokenizer.ggml.eom_token_id", 3)

    source = GgufSource(write_gguf(tmp_path / "m.gguf", hf_tensors(), metadata=metadata))
    assert source.model_config.eos_token_id == (1, 3)


def test_what_a_file_is_instead_is_said(tmp_path):
    pointer = tmp_path / "m.gguf"
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(InputError, match="pointer of Git LFS"):
        GgufSource(pointer)
    path = write_gguf(tmp_path / "n.gguf", hf_tensors())
    name = b"blk.0.attn_q.weight"
    content = bytearray(path.read_bytes())
    at = content.index(name) + len(name) + 4 + 2 * 8
    content[at : at + 4] = (250).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"250\) .*does not know this type of tensor; pip install --upgrade gguf"):
        GgufSource(path)


def test_the_config_is_read_from_the_header(tmp_path):
    def metadata(writer):
        writer.add_rope_freq_base(500000.0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    config = GgufSource(write_gguf(tmp_path / "m.gguf", hf_tensors(), metadata=metadata)).model_config
    assert (config.vocab_size, config.num_hidden_layers, config.head_dim) == (VOCAB, LAYERS, HEAD_DIM)
    assert (config.rms_norm_eps, config.rope.theta) == (1e-5, 500000.0)
    assert (config.bos_token_id, config.eos_token_id) == (1, (2,))


@pytest.mark.parametrize("value", [1e-5, 1e-6, 1e-12, 0.1, 10000.0, 500000.0, 1000000.0, 8.0])
def test_shortest_decimal_undoes_float32(value):
    assert shortest_decimal(float(np.float32(value))) == value


@settings(max_examples=200)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_shortest_decimal_is_the_same_float32(value):
    assert np.float32(shortest_decimal(value)) == np.float32(value)


def llama3_divisors(factor, theta=500000.0, low=1.0, high=4.0, context=8192):
    """Meta's rule, frequency by frequency: long waves are stretched, short ones kept, those between blended."""
    divisors = []
    for i in range(0, HEAD_DIM, 2):
        wavelength = 2 * np.pi * theta ** (i / HEAD_DIM)
        if wavelength < context / high:
            divisors.append(1.0)
        elif wavelength > context / low:
            divisors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rope_scaling_of_llama_3_is_recovered_from_its_divisors(tmp_path, factor):
    extra = {"rope_freqs.weight": llama3_divisors(factor)}
    path = write_gguf(
        tmp_path / "m.gguf", hf_tensors(), extra=extra, metadata=lambda writer: writer.add_rope_freq_base(500000.0)
    )
    rope = GgufSource(path).model_config.rope
    assert (rope.rope_type, rope.factor, rope.low_freq_factor, rope.high_freq_factor) == ("llama3", factor, 1.0, 4.0)
    assert rope.original_max_positions == 8192


@pytest.mark.parametrize(
    "divisors",
    [llama3_divisors(8.0) * np.linspace(1, 1.1, HEAD_DIM // 2, dtype=np.float32), np.ones((3, 2, 8), np.float32)],
    ids=["scaled", "three axes"],
)
def test_divisors_of_another_rule_are_refused(tmp_path, divisors):
    path = write_gguf(tmp_path / "m.gguf", hf_tensors(), extra={"rope_freqs.weight": divisors})
    with pytest.raises(InputError, match=r"rope_freqs\.weight"):
        GgufSource(path)


@pytest.mark.parametrize(
    ("kind", "name"), [(gguf.RopeScalingType.LINEAR, "linear"), (gguf.RopeScalingType.YARN, "yarn")]
)
def test_other_rope_scalings_are_read(tmp_path, kind, name):
    def metadata(writer):
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    rope = GgufSource(write_gguf(tmp_path / "m.gguf", hf_tensors(), metadata=metadata)).model_config.rope
    assert (rope.rope_type, rope.factor) == (name, 4.0)


def test_a_sliding_window_makes_it_a_mistral(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", hf_tensors(), metadata=lambda writer: writer.add_sliding_window(16))
    config = GgufSource(path).model_config
    assert (config.model_type, config.sliding_window) == ("mistral", 16)


@pytest.mark.parametrize(
    ("change", "metadata", "expected"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), None, r"blk\.1\.ffn_up\.weight is missing"),
        (lambda t: t.pop("model.embed_tokens.weight"), None, r"token_embd\.weight"),
        (
            lambda t: t.update({"model.norm.weight": np.ones(63, np.float32)}),
            None,
            r"output_norm\.weight has shape \[63\].*\[64\]",
        ),
        (None, lambda w: w.add_key_length(8), "rope.dimension_count is 16, the head dimension 8"),
        (None, lambda w: w.add_value_length(8), "value_length is 8"),
        (None, lambda w: w.add_head_count(0), "head_count"),
        (None, lambda w: w.add_head_count_kv([2, 4]), r"head_count_kv in the GGUF header is \[2, 4\]"),
        (None, lambda w: w.add_rope_scaling_attn_factors(1.5), "rope.scaling.attn_factor"),
        (
            None,
            lambda w: w.add_uint16("split.count", 3),
            "one of 3 parts, but is not called NAME-00001-of-00003",
        ),
        (None, lambda w: w.add_block_count(3), r"blk\.2\..* is missing"),
        (None, lambda w: w.add_block_count(2**31), "block_count in the GGUF header is '2147483648'"),
        (None, lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "'longrope'"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(tmp_path, change, metadata, expected):
    tensors = hf_tensors()
    if change:
        change(tensors)
    path = write_gguf(tmp_path / "m.gguf", tensors, metadata=metadata)
    with pytest.raises(InputError, match=expected) as caught:
        GgufSource(path)
    assert "\n" not in str(caught.value)


def test_an_unused_tensor_is_refused_by_name(tmp_path):
    path = write_gguf(
        tmp_path / "m.gguf", hf_tensors(), extra={"blk.0.ffn_gate_inp.weight": np.ones((4, 64), np.float32)}
    )
    with pytest.raises(InputError, match=r"blk\.0\.ffn_gate_inp\.weight \[4, 64\]"):
        GgufSource(path)


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", hf_tensors(), arch="mamba")
    with pytest.raises(InputError, match="'mamba'"):
        GgufSource(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused_when_its_block_is_loaded(tmp_path, value):
    tensors = hf_tensors()
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = value
    source = GgufSource(write_gguf(tmp_path / "m.gguf", tensors))
    source.load_block(0)
    with pytest.raises(InputError, match=rf"{QUERY} holds 1 NaN"):
        source.load_block(1)


@pytest.mark.parametrize("fraction", [0.0, 0.0001, 0.002, 0.01, 0.02, 0.5, 0.99])
def test_a_file_cut_short_is_refused_at_construction(tmp_path, fraction):
    path = write_gguf(tmp_path / "m.gguf", hf_tensors())
    os.truncate(path, int(path.stat().st_size * fraction))
    with pytest.raises(InputError, match="not a whole GGUF file"):
        GgufSource(path)


def test_a_file_cut_short_while_open_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", hf_tensors())
    source = GgufSource(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match="fetch it again"):
        [source.load_block(i) for i in range(LAYERS)]


def test_the_other_byte_order_and_other_files_are_refused(tmp_path):
    path = write_gguf(tmp_path / "big.gguf", hf_tensors(), endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(InputError, match="byte order"):
        GgufSource(path)
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(InputError, match="not a whole GGUF file"):
        GgufSource(tmp_path / "x.gguf")
    with pytest.raises(InputError, match="is not a file"):
        GgufSource(tmp_path / "absent.gguf")


def test_the_fingerprint_holds_still_and_follows_dtype_and_time(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", hf_tensors())
    before = GgufSource(path).fingerprint()
    assert GgufSource(path).fingerprint() == before
    assert GgufSource(path, dtype=np.float16).fingerprint() != before
    os.utime(path, ns=(0, 1))
    assert GgufSource(path).fingerprint() != before


def test_a_model_in_parts_is_that_in_one_file(tmp_path):
    tensors = hf_tensors()
    whole = GgufSource(write_gguf(tmp_path / "m.gguf", tensors))
    write_gguf(tmp_path / "p.gguf", tensors, tensors_per_part=7)
    parts = sorted(tmp_path.glob("p-*.gguf"))
    assert len(parts) == -(-len(tensors) // 7) > 2
    source = GgufSource(parts[0])
    assert source.files == tuple(parts)
    chex.assert_trees_all_equal(load_all(source, source.model), load_all(whole, whole.model))
    before = source.fingerprint()
    os.utime(parts[1], ns=(0, 1))
    assert GgufSource(parts[0]).fingerprint() != before
    with pytest.raises(InputError, match="changed"):
        load_all(source, source.model)
    with pytest.raises(InputError, match=f"name its first part: {parts[0]}"):
        GgufSource(parts[1])
    third = parts[2].rename(tmp_path / "aside")
    with pytest.raises(InputError, match=f"1 of its {len(parts)} parts are missing, such as {parts[2].name}"):
        GgufSource(parts[0])
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(InputError, match=r"says that it is part 1 \(from 0\)"):
        GgufSource(parts[0])
    third.rename(parts[2])
    assert GgufSource(parts[0]).fingerprint() != before
