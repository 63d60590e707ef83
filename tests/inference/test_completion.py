"""Text as it grows, and completions of a batch: stops, streaming, rates."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluscomp_jax.errors import InputError
from cluscomp_jax.inference.completion import complete
from cluscomp_jax.inference.decoder import Decoder
from cluscomp_jax.inference.sampling import Sampling
from cluscomp_jax.io.open import open_model
from cluscomp_jax.text.text_stream import TextStream


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(tokens).decode("utf-8", errors="replace")


def until_stop(text: str, stops: Sequence[str]) -> str:
    """The text, read letter by letter until it ends in a stop."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@settings(max_examples=200)
@example(text="aéa", stops=["é", "aéa"])
@given(text=st.text("abcé東😀", max_size=20), stops=st.lists(st.text("abcé", min_size=1, max_size=3), max_size=3))
def test_the_pieces_are_the_text_up_to_the_first_stop(text: str, stops: list[str]) -> None:
    stream = TextStream(Bytes(), stops)
    pieces = [stream.push(byte) for byte in text.encode()]
    pieces.append(stream.close())
    assert "".join(pieces) == stream.text == until_stop(text, stops)
    assert stream.stopped == any(stop in text for stop in stops)


def test_nothing_is_given_out_that_a_stop_may_take_back() -> None:
    stream = TextStream(Bytes(), ["\n\nQ:"])
    assert [stream.push(byte) for byte in b"a\n\nb\n\nQ: c"] == ["a", "", "", "\n\nb", "", "", "", "", "", ""]
    assert stream.stopped
    assert stream.close() == ""


def test_half_a_character_waits_for_the_rest() -> None:
    stream = TextStream(Bytes())
    assert [stream.push(byte) for byte in "né".encode()] == ["n", "", "é"]
    stream.push("é".encode()[0])
    assert stream.close() == "\ufffd"


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> Decoder:
    opened = open_model(tiny_model)
    return Decoder.load(opened.source, opened.model, dtype="float32", decode_weights="once")


def run(decoder: Decoder, tiny_model: Path, texts: list[str], **options: object) -> tuple:  # type: ignore[type-arg]
    tokenizer = open_model(tiny_model).load_tokenizer()
    prompts = [np.asarray(tokenizer(text)["input_ids"], np.int32) for text in texts]
    fixed = {"max_new_tokens": 12, "sampling": Sampling(), "key": jax.random.key(0)}
    return complete(decoder, tokenizer, prompts, **{**fixed, **options})  # type: ignore[arg-type]


def test_a_batch_streams_what_it_returns(decoder: Decoder, tiny_model: Path) -> None:
    texts = ["The city of", "In the beginning of the nineteenth century there was"]
    shown = {0: "", 1: ""}

    def show(row: int, text: str) -> None:
        shown[row] += text

    completions, rates = run(decoder, tiny_model, texts, on_text=show)
    assert shown == {0: completions[0].text, 1: completions[1].text}
    for text, completion in zip(texts, completions, strict=True):
        alone = run(decoder, tiny_model, [text])[0][0]
        assert (alone.tokens, alone.text) == (completion.tokens, completion.text)
        assert completion.stop == "length"
    assert rates.decode_tokens == 2 * 11
    assert rates.prefill_seconds > 0 < rates.decode_seconds
    assert rates.prefill_rate == rates.prefill_tokens / rates.prefill_seconds


def test_every_row_ends_at_its_own_stop(decoder: Decoder, tiny_model: Path) -> None:
    (free,), _ = run(decoder, tiny_model, ["The city of"])
    word = free.text.split()[1]
    (cut,), _ = run(decoder, tiny_model, ["The city of"], stop_strings=[word])
    assert (cut.text, cut.stop) == (free.text[: free.text.index(word)], "string")
    assert len(cut.tokens) < len(free.tokens)
    (ended,), _ = run(decoder, tiny_model, ["The city of"], stop_tokens=[free.tokens[2]])
    assert (ended.tokens, ended.stop) == (free.tokens[: free.tokens.index(free.tokens[2]) + 1], "token")
    with pytest.raises(InputError, match="stop string is empty"):
        run(decoder, tiny_model, ["The"], stop_strings=[""])
