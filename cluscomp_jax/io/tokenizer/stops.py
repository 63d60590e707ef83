"""The tokens that end a text or a turn of a chat."""

from typing import Any

_ENDS = (
    "<|endoftext|>", "<|end_of_text|>",
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>", "<|eot|>", "<EOT>",
)  # fmt: skip
"""Special tokens by which the published chat models end a turn; a file often names only the end of a text."""


def stop_tokens(config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Returns the tokens after which generation stops, ascending.

    Args:
      config: of the model; its `eos_token_id`, a tuple, if it has one.
      tokenizer: as `load_tokenizer` returns it; its end token, and every special token known to end a turn.
    """
    ends = {*getattr(config, "eos_token_id", ()), tokenizer.eos_token_id}
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends |= {special[token] for token in _ENDS if token in special}
    return tuple(sorted(token for token in ends if token is not None))
