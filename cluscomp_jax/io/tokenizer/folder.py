"""The tokenizer that tokenizer.json describes, whatever class a Hugging Face folder names.

transformers chooses a class by tokenizer_class and model_type, and several of its classes replace the normaliser and
the pre-tokenizer of tokenizer.json by their own. So the file is read with `tokenizers`, and wrapped in the one class
that adds nothing. tokenizer_config.json gives the roles of the special tokens and the chat template.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluscomp_jax.errors import InputError
from cluscomp_jax.io.hf.hub import transformers
from cluscomp_jax.runtime.extras import needed_for
from cluscomp_jax.runtime.json_files import read_object
from cluscomp_jax.runtime.lfs_pointer import refuse_lfs_pointer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG, _SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
NO_LIMIT = 10**30
"""transformers' model_max_length where none is known."""
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def read_tokenizer(folder: Path) -> Any:
    """Returns the transformers tokenizer (fast, no PyTorch) of a folder that holds tokenizer.json.

    Raises:
      InputError: a file is broken, or names a begin or end token that is no token; the extra `hf` is missing.
    """
    file = folder / TOKENIZER_JSON
    refuse_lfs_pointer(file)
    with needed_for("a tokenizer", "hf"):
        import tokenizers
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more specific
        raise InputError(f"{file}: cannot be read: {' '.join(str(error).split())[:160]}; fetch it again") from None
    fields = read_settings(folder)
    length = fields.get("model_max_length")
    tokenizer = wrap(
        backend,
        special=_special_tokens(folder, fields, backend),
        length=int(length) if isinstance(length, int | float) and 0 < length < NO_LIMIT else None,
        clean_up=fields.get("clean_up_tokenization_spaces") is True,
    )
    tokenizer.chat_template = read_chat_template(folder, fields)
    return tokenizer


def read_settings(folder: Path) -> dict[str, Any]:
    """Returns the fields of tokenizer_config.json, none where there is no such file."""
    file = folder / TOKENIZER_CONFIG
    return read_object(file, foreign=True) if file.is_file() else {}


def token_text(named: Any) -> str | None:
    """Returns the text of a token that a settings file names by a text or by {"content"}; None of anything else."""
    text = named.get("content") if isinstance(named, dict) else named
    return text if isinstance(text, str) else None


def wrap(backend: "Tokenizer", *, special: dict[str, str], length: int | None, clean_up: bool = False) -> Any:
    """Returns a transformers tokenizer that encodes exactly as `backend`.

    Args:
      backend: of the caller's making; it no longer truncates or pads afterwards.
      special: {"bos_token", "eos_token", "unk_token", "pad_token": a token of the vocabulary}.
      length: tokens of the model's context, or None.
      clean_up: whether decoding removes spaces before punctuation.
    """
    backend.no_truncation()
    backend.no_padding()
    tokenizer = transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=NO_LIMIT if length is None else length,
        clean_up_tokenization_spaces=clean_up,
        **special,
    )
    # Some releases of transformers set a post-processor of their own.
    for part in _PARTS:
        if (ours := getattr(backend, part)) is not None:
            setattr(tokenizer.backend_tokenizer, part, ours)
    return tokenizer


def _special_tokens(folder: Path, fields: dict[str, Any], backend: "Tokenizer") -> dict[str, str]:
    """Returns {role: token}; unknown and padding tokens that the vocabulary lacks are left out."""
    named = {**(read_object(folder / _SPECIAL) if (folder / _SPECIAL).is_file() else {}), **fields}
    special = {}
    for role in ROLES:
        token = token_text(named.get(role))
        if token is None:
            continue
        if backend.token_to_id(token) is not None:
            special[role] = token
        elif role in ("bos_token", "eos_token"):
            raise InputError(
                f"{folder / TOKENIZER_CONFIG}: {role} is {token!r}, which is no token of {TOKENIZER_JSON}; mend it"
            )
    return special


def read_chat_template(folder: Path, fields: dict[str, Any]) -> str | dict[str, str] | None:
    """Returns the chat template, or {name: template} of several; a file of its own precedes tokenizer_config.json."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    if (file := folder / "chat_template.json").is_file():
        fields = read_object(file)
    template = fields.get("chat_template")
    if isinstance(template, list):
        try:
            return {entry["name"]: entry["template"] for entry in template}
        except (TypeError, KeyError):
            raise InputError(f"{folder}: chat_template lists entries without name and template; mend it") from None
    if template is not None and not isinstance(template, str):
        raise InputError(f"{folder}: chat_template is {json.dumps(template)[:80]}; a text is expected")
    return template
