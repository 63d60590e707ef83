"""What distinguishes two tokenizers: their vocabularies, and the tokens of a few texts."""

import hashlib
import json
from typing import Any

_PROBES = (
    "Hello,  world! It's 1234567 + 3.14.",
    " leading and trailing spaces  ",
    "def f(x):\n\treturn x**2\n\n\n# Ünïcödé: été, e\u0301te\u0301, Straße",
    "東京タワー 한국어 Привет عربى 🙂👩‍👩‍👧",
    "DON'T don't www.example.org/a_b?c=1&d=[2]",
)


def tokenizer_digest(tokenizer: Any) -> str:
    """Returns a hex SHA-256 that is equal where two tokenizers have equal vocabularies and split equally.

    It depends on what a tokenizer does and not on how a release of a library describes it. Texts of a few scripts, with
    digits, spaces and capitals, stand in for all texts.

    Args:
      tokenizer: as `load_tokenizer` returns it.
    """
    vocabulary = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    encoded = [list(tokenizer(text, verbose=False)["input_ids"]) for text in _PROBES]
    return hashlib.sha256(json.dumps([vocabulary, encoded]).encode()).hexdigest()
