"""Text models inside larger ones: the fields of a nested config that are the text model's, and its tensors' names.

A vision-language model of `NESTINGS` is a text model of a family, between tensors that are carried along as they are.
Knows no family and no files.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from cluscomp_jax.errors import InputError

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class NestedNames:
    """One way in which a file names the tensors of a text model. Invariant: `plain(stored(name)) == name`.

    Attributes:
      prefixes: (prefix of the stored name, what the plain name has in its place); the first pair that fits counts.
        Only names of the text model begin with the first stored prefix.
    """

    prefixes: tuple[tuple[str, str], ...]

    def plain(self, stored: str) -> str | None:
        """Returns the name that the text model alone has for a tensor; None: the tensor is outside of it."""
        for prefix, plain in self.prefixes:
            if stored.startswith(prefix):
                return plain + stored.removeprefix(prefix)
        return None

    def stored(self, plain: str) -> str:
        """Returns the name in the file.

        Raises:
          InputError: the file has no name for it.
        """
        for prefix, beginning in self.prefixes:
            if plain.startswith(beginning):
                return prefix + plain.removeprefix(beginning)
        raise InputError(f"tensor {plain!r} of a text model has no name with the prefixes {self.prefixes}")

    def split(self, tensors: Mapping[str, _T]) -> tuple[dict[str, _T], dict[str, _T]]:
        """Returns ({plain name: tensor} of the text model, {stored name: tensor} of all others)."""
        inside: dict[str, _T] = {}
        outside: dict[str, _T] = {}
        for name, tensor in tensors.items():
            plain = self.plain(name)
            if plain is None:
                outside[name] = tensor
            else:
                inside[plain] = tensor
        return inside, outside


@dataclasses.dataclass(frozen=True)
class Nesting:
    """How a model_type contains its text model.

    Attributes:
      text_config: the field of config.json that is the text model's config.
      names: the ways in which files name the text model's tensors; a file is of one of them.
      inner_tie: whether `tie_word_embeddings` of the text config counts where that of the whole config is not set.
      tied: what it is where neither config says.
      text_type: the model_type of a text config that names none.
    """

    names: tuple[NestedNames, ...]
    text_config: str = "text_config"
    inner_tie: bool = False
    tied: bool = False
    text_type: str = "llama"


_LANGUAGE_MODEL = (
    NestedNames((("language_model.", ""),)),
    NestedNames((("model.language_model.", "model."), ("lm_head.", "lm_head."))),
)
"""Hubs have the first form, and transformers 4 and 5 save it; the second is that of the modules since 4.52."""
NESTINGS: dict[str, Nesting] = {
    "llava": Nesting(_LANGUAGE_MODEL, inner_tie=True),
    "llava_next": Nesting(_LANGUAGE_MODEL),
    "gemma3": Nesting(_LANGUAGE_MODEL, inner_tie=True, tied=True, text_type="gemma3_text"),
}
"""{model_type: how it contains its text model}."""

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, **dict(zip(_SIZES, (4096, 11008, 32, 32, None), strict=True))},
    "mistral": {"vocab_size": 32000, **dict(zip(_SIZES, (4096, 14336, 32, 32, 8), strict=True))},
    "qwen2": {"vocab_size": 151936, **dict(zip(_SIZES, (4096, 22016, 32, 32, 32), strict=True))},
    "gemma3_text": {"vocab_size": 262208, **dict(zip(_SIZES, (2304, 9216, 26, 8, 4), strict=True))},
}
"""The sizes that transformers takes where a nested config leaves them out, as those of hubs do."""


def register_nesting(model_type: str, nesting: Nesting) -> None:
    """Adds a model_type whose text model is of a family that is served."""
    NESTINGS[model_type] = nesting


def nesting_of(fields: Mapping[str, Any]) -> Nesting | None:
    """Returns how the model of a config.json mapping contains its text model; None: it is a text model itself."""
    model_type = fields.get("model_type")
    return NESTINGS.get(model_type) if isinstance(model_type, str) else None


def text_fields(fields: Mapping[str, Any], nesting: Nesting) -> dict[str, Any]:
    """Returns the config.json mapping that the text model would have alone.

    Token numbers and `quantization_config` of the whole config replace those of the text config.

    Raises:
      InputError: there is no text config.
    """
    text = fields.get(nesting.text_config)
    if not isinstance(text, Mapping):
        raise InputError(
            f"config: {nesting.text_config} of {fields.get('model_type')} is {type(text).__name__}; "
            "it must be the mapping of the text model"
        )
    model_type = text.get("model_type") or nesting.text_type  # as transformers reads the oldest of these configs
    given = {name: value for name, value in text.items() if value is not None or name not in _SIZES}
    merged = {**_DEFAULTS.get(str(model_type), {}), **given, "model_type": model_type}
    for name in (*_TOKENS, "quantization_config"):
        if fields.get(name) is not None:
            merged[name] = fields[name]
    ties = [fields.get("tie_word_embeddings"), merged.get("tie_word_embeddings") if nesting.inner_tie else None]
    said = [tie for tie in ties if tie is not None]
    merged["tie_word_embeddings"] = any(said) if said else nesting.tied
    return merged


def names_in(nesting: Nesting, tensors: Iterable[str], where: str) -> NestedNames:
    """Returns the way in which a file names the text model's tensors.

    Args:
      nesting: of its model_type.
      tensors: the names in the file.
      where: the file or folder, for errors.

    Raises:
      InputError: it has names of none of the ways, or of several.
    """
    tensors = list(tensors)
    found = [names for names in nesting.names if any(name.startswith(names.prefixes[0][0]) for name in tensors)]
    if len(found) != 1:
        shown = ", ".join(names.prefixes[0][0] for names in (found or nesting.names))
        what = "names of both" if found else "no tensor with any"
        raise InputError(
            f"{where}: {what} of the prefixes of a text model, {shown}; do config and file belong together?"
        )
    return found[0]
