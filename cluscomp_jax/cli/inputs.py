"""What several commands read: tokens of a text under a model's tokenizer. Knows no command."""

from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_jax.errors import InputError
from cluscomp_jax.io.open import OpenedModel
from cluscomp_jax.text.text import Split, load_tokens


def read_tokens(opened: OpenedModel, spec: str, *, split: Split = "test", first: int | None = None) -> np.ndarray:
    """Returns int32 [t] tokens of a text file, token array or named data set; `first` cuts them there.

    Raises:
      InputError: the text cannot be read, the model carries no tokenizer, or there are fewer than `first` tokens.
    """
    tokenizer: Any = None if Path(spec).suffix == ".npy" else opened.load_tokenizer()
    tokens = load_tokens(spec, tokenizer, split=split, vocab_size=opened.config.vocab_size)
    if first is not None and len(tokens) < first:
        raise InputError(f"{spec} has {len(tokens)} tokens, --tokens asks for the first {first}; ask for fewer")
    return tokens[:first]


def begin_token(opened: OpenedModel, spec: str) -> int:
    """Returns the token that begins every window of a text: the tokenizer's, of a token array the config's.

    Raises:
      InputError: the model names none.
    """
    owner = opened.config if Path(spec).suffix == ".npy" else opened.load_tokenizer()
    begin = getattr(owner, "bos_token_id", None)
    if begin is None:
        raise InputError(f"--begin-windows: {opened.name} names no token that begins a text; leave it out")
    return int(begin)


def require_windows(spec: str, tokens: np.ndarray, context: int) -> None:
    """Raises InputError where the tokens do not fill one window of `context`."""
    if context < 2:
        raise InputError(f"--context {context}: it must be 2 or more")
    if len(tokens) < context:
        raise InputError(f"{spec}: {len(tokens)} tokens do not fill one window of --context {context}; lower it")
