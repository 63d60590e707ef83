"""The tokenizer that a GGUF header describes, rebuilt with the `tokenizers` library.

Knows metadata keys only. It exists because the conversion inside transformers imports PyTorch and
loses the digit splitting of SmolLM2.
"""

from collections.abc import Callable, Mapping
from typing import Any

from cluscomp_jax.errors import InputError
from cluscomp_jax.io.tokenizer.folder import wrap
from cluscomp_jax.runtime.extras import needed_for

with needed_for("a tokenizer", "hf"):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # values of tokenizer.ggml.token_type
_SPACE = "▁"

# The splitting patterns of the models' own tokenizer.json files.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split_by(pattern: str) -> Callable[[], list[Any]]:
    return lambda: [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def _byte_level() -> list[Any]:
    return [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]


def _digits_alone() -> list[Any]:
    return [pre_tokenizers.Digits(individual_digits=True), *_byte_level()]


_DEFAULT_SPLITS = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
"""What llama.cpp does for "default"; the converter writes that for tokenizers it does not know."""


def _default() -> list[Any]:
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _DEFAULT_SPLITS]
    return [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


_PRE_TOKENIZERS: dict[str, Callable[[], list[Any]]] = {
    "default": _default,
    "gpt-2": _byte_level,
    "smollm": _digits_alone,
    "refact": _digits_alone,
    "llama-bpe": _split_by(_LLAMA3_SPLIT),
    "llama3": _split_by(_LLAMA3_SPLIT),
    "llama-v3": _split_by(_LLAMA3_SPLIT),
    "dbrx": _split_by(_LLAMA3_SPLIT),
    "smaug-bpe": _split_by(_LLAMA3_SPLIT),
    "qwen2": _split_by(_QWEN2_SPLIT),
    "deepseek-r1-qwen": _split_by(_QWEN2_SPLIT),
    "tekken": _split_by(_TEKKEN_SPLIT),
}
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_WHOLE_WORDS_FIRST = (*_LLAMA3, "tekken")  # a word that is a token is not merged up from its bytes
_NORMALISED = ("qwen2", "deepseek-r1-qwen")


def build_tokenizer(metadata: Mapping[str, Any], *, where: str) -> Any:
    """Returns a transformers tokenizer (fast, no PyTorch) for the header of a GGUF file.

    Args:
      metadata: {key: value} of the header; its tokenizer.* keys are read.
      where: the file, for errors.

    Raises:
      InputError: no tokenizer in the header, or one of a type that is not supported; the line names it.
    """
    try:
        return _build(metadata)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _build(metadata: Mapping[str, Any]) -> Any:
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if kind is None or not tokens:
        raise InputError("the GGUF header describes no tokenizer (tokenizer.ggml.model and tokenizer.ggml.tokens)")
    if kind not in ("gpt2", "llama"):
        raise InputError(f"tokenizer.ggml.model {kind!r} of the GGUF file is not supported; supported: gpt2, llama")
    special = _special_tokens(metadata, tokens)
    backend = _byte_level_bpe(metadata, tokens) if kind == "gpt2" else _sentencepiece_bpe(metadata, tokens)
    types = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise InputError(f"tokenizer.ggml.token_type lists {len(types)} types for {len(tokens)} tokens")
    whole = (_CONTROL, _USER_DEFINED)
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=token_type == _CONTROL)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type in whole
        ]
    )
    _add_template(backend, metadata, special, kind)
    tokenizer = wrap(backend, special=special, length=_context_length(metadata))
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def _context_length(metadata: Mapping[str, Any]) -> int | None:
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return length if isinstance(length, int) and length > 0 else None


def _special_tokens(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    special = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is None:
            continue
        if not 0 <= number < len(tokens):
            raise InputError(f"tokenizer.ggml.{key}_token_id is {number}, the vocabulary has {len(tokens)} tokens")
        special[f"{role}_token"] = tokens[number]
    return special


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise InputError(f"tokenizer.ggml.tokens lists {len(tokens)} tokens of which {len(vocabulary)} are distinct")
    return vocabulary


def _merges(metadata: Mapping[str, Any], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    pairs = []
    for merge in metadata.get("tokenizer.ggml.merges") or ():
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise InputError(f"tokenizer.ggml.merges holds {merge!r}; two tokens that make a third are expected")
        pairs.append((left, right))
    return pairs


def _byte_level_bpe(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in _PRE_TOKENIZERS:
        raise InputError(
            f"tokenizer.ggml.pre {pre!r} of the GGUF file is not supported; "
            f"supported: {', '.join(sorted(_PRE_TOKENIZERS))}"
        )
    vocabulary = _vocabulary(tokens)
    merges = _merges(metadata, vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    if pre in _NORMALISED:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(_PRE_TOKENIZERS[pre]())
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    """SentencePiece's BPE (Llama 1 and 2, Mistral): merges are implied by the scores of the pieces."""
    vocabulary = _vocabulary(tokens)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    merges = _merges(metadata, vocabulary) or _merges_of_scores(vocabulary, metadata.get("tokenizer.ggml.scores"))
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    )
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    # Prepended even to a text that begins with a space, as SentencePiece does; Metaspace would not.
    before = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges_of_scores(vocabulary: Mapping[str, int], scores: list[float] | None) -> list[tuple[str, str]]:
    """Returns every split of a piece into two pieces; by the score of the piece, its number, those of its parts."""
    if scores is None or len(scores) != len(vocabulary):
        raise InputError("tokenizer.ggml.scores of the GGUF file is missing or not one number per token")
    ranked = []
    for piece, number in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = vocabulary.get(piece[:cut]), vocabulary.get(piece[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[number], number, left, right, (piece[:cut], piece[cut:])))
    return [pair for *_, pair in sorted(ranked)]


def _add_template(backend: Tokenizer, metadata: Mapping[str, Any], special: Mapping[str, str], kind: str) -> None:
    """Adds begin and end tokens around every text, where the header, or by default the tokenizer's type, says so."""
    begins_unsaid = kind == "llama" or metadata.get("tokenizer.ggml.pre") in _LLAMA3
    wanted = {
        "bos_token": metadata.get("tokenizer.ggml.add_bos_token", begins_unsaid),
        "eos_token": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    added = {role: special[role] for role, want in wanted.items() if want and role in special}
    if added:
        backend.post_processor = processors.TemplateProcessing(
            single=[t for t in (added.get("bos_token"), "$A", added.get("eos_token")) if t],
            special_tokens=[(token, backend.token_to_id(token)) for token in added.values()],
        )
