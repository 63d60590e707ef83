"""Tokenizers: read from the files that describe them, and texts in their tokens."""

from cluscomp_jax.io.tokenizer.digest import tokenizer_digest
from cluscomp_jax.io.tokenizer.load import TOKENIZER_FOLDER, encode_text, guess_tokenizer, load_tokenizer, start_tokens
from cluscomp_jax.io.tokenizer.stops import stop_tokens
from cluscomp_jax.io.tokenizer.write import write_tokenizer

__all__ = [
    "TOKENIZER_FOLDER",
    "encode_text",
    "guess_tokenizer",
    "load_tokenizer",
    "start_tokens",
    "stop_tokens",
    "tokenizer_digest",
    "write_tokenizer",
]
