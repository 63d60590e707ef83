"""Text and tokens: files, named data sets, calibration samples. Knows no models and no tokenizer's insides."""

import gzip
import textwrap
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from cluscomp_jax.errors import InputError
from cluscomp_jax.io.tokenizer import encode_text
from cluscomp_jax.runtime.extras import needed_for
from cluscomp_jax.text.json_lines import encode_lines, holds_json_lines

Split = Literal["train", "test"]


class _DataSet(NamedTuple):
    """Where a named data set is on the hub and how its texts become one.

    Attributes:
      splits: {our split: (its split, its data files or None)}.
      rows: how many texts are taken from the front, None for all.
    """

    repository: str
    name: str | None
    revision: str | None
    splits: dict[str, tuple[str, str | None]]
    column: str
    separator: str
    rows: int | None


DATA_SETS = {
    "wikitext2": _DataSet(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        None,
        {"train": ("train", None), "test": ("test", None)},
        "text",
        "\n\n",
        None,
    ),
    "c4": _DataSet(
        "allenai/c4",
        None,
        None,
        {
            "train": ("train", "en/c4-train.00000-of-01024.json.gz"),
            "test": ("validation", "en/c4-validation.00000-of-00008.json.gz"),
        },
        "text",
        " ",
        2000,
    ),
    "ptb": _DataSet(
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        "refs/convert/parquet",
        {"train": ("train", None), "test": ("test", None)},
        "sentence",
        " ",
        None,
    ),
}


def read_text(spec: str | Path, *, split: Split = "test") -> str:
    """Returns a text as one string.

    Args:
      spec: a UTF-8 text file (compressed if it ends in .gz), read as it is; or the name of a data set of the hub:
        "wikitext2" (raw, lines joined by two newlines), "c4" (the first 2000 texts of the first file, joined by
        spaces), "ptb" (sentences joined by spaces). A file of such a name is written "./c4".
      split: which part of a named data set; files have none.

    Raises:
      InputError: no such file, no UTF-8, a broken .gz, an empty text, or a data set that cannot be had.
    """
    if str(spec) in DATA_SETS:
        return _read_data_set(str(spec), split)
    path = Path(spec)
    if not path.is_file():
        raise InputError(f"text {str(spec)!r} is neither a file nor one of the data sets {', '.join(DATA_SETS)}")
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not text.strip():
        raise InputError(f"{path} holds no text ({len(text)} characters)")
    return text


def _read_data_set(name: str, split: Split) -> str:
    source = DATA_SETS[name]
    with needed_for(f"data set {name!r}", "hf"):
        import datasets
    part, files = source.splits[split]
    try:
        rows = datasets.load_dataset(
            source.repository,
            source.name,
            data_files={part: files} if files else None,
            revision=source.revision,
            split=part,
        )
    except Exception as error:  # datasets raises types of half a dozen packages when it is offline
        reason = textwrap.shorten(str(error), 160, placeholder=" …")
        raise InputError(f"data set {name!r} cannot be loaded: {reason}; give a text file instead") from None
    if source.rows is not None:
        rows = rows.select(range(min(source.rows, len(rows))))
    return source.separator.join(rows[source.column])


def load_tokens(
    spec: str | Path, tokenizer: Any, *, split: Split = "test", vocab_size: int | None = None
) -> np.ndarray:
    """Returns the token ids int32 [tokens] of a text or of a token array.

    Args:
      spec: what `read_text` takes; JSON lines (.jsonl or .jsonl.gz), whose texts and conversations follow one another
        as `encode_lines` says; or a .npy file of integers of one axis.
      tokenizer: of transformers; not used for .npy and may then be None.
      split: as in `read_text`.
      vocab_size: where given, every id must be below it.

    Raises:
      InputError: as `read_text` and `encode_lines`; JSON of another form or a table, by its name; a .npy file of
        another content; an id outside the vocabulary.
    """
    if Path(spec).suffix == ".npy":
        tokens = _read_token_array(Path(spec))
    elif str(spec) not in DATA_SETS and holds_json_lines(Path(spec)):
        tokens = encode_lines(Path(spec), tokenizer)
    else:
        tokens = encode_text(tokenizer, read_text(spec, split=split))
    if vocab_size is not None:
        check_vocabulary(tokens, vocab_size, where=str(spec))
    return tokens


def _read_token_array(path: Path) -> np.ndarray:
    if not path.is_file():
        raise InputError(f"token file {path} does not exist")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError):
        raise InputError(
            f"{path} is damaged, or no array of token ids; write it again with numpy.save(path, ids)"
        ) from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} is an archive of several arrays; token ids come as one .npy")
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{path} holds {array.dtype} {list(array.shape)}; token ids are integers of one axis")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < 2**31:
        raise InputError(f"{path} holds ids from {array.min()} to {array.max()}; token ids are 0 … {2**31 - 1}")
    return np.asarray(array, dtype=np.int32)


def check_vocabulary(tokens: np.ndarray, vocab_size: int, *, where: str) -> None:
    """Raises InputError if an id is outside 0 … vocab_size-1."""
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        worst = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
        raise InputError(f"{where} holds token id {worst}, the vocabulary has {vocab_size}; use the model's tokenizer")


def read_starts(path: str | Path) -> np.ndarray:
    """Returns start positions int64 [starts] from a file with one integer per line.

    Raises:
      InputError: no such file, a line that is no integer from 0 up, or no line at all.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"starts file {path} cannot be read: {error}") from None
    sample_offsets = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not line.strip().isdecimal() or len(line.strip()) > 18:
            raise InputError(f"{path} line {number}: {line.strip()[:40]!r} is no start position (an integer from 0)")
        sample_offsets.append(int(line))
    if not sample_offsets:
        raise InputError(f"starts file {path} holds no positions")
    return np.asarray(sample_offsets, dtype=np.int64)


def begin_windows(tokens: np.ndarray, begin: int, context: int) -> np.ndarray:
    """Returns a token stream whose windows of `context` tokens each have `begin` before context - 1 tokens of the text.

    Some models, Gemma among them, expect their BOS at the first position of whatever they read. What does not fill the
    last window is dropped, and so is a `begin` that the text itself has at its start.

    Args:
      tokens: int [tokens].
      begin: the token, as a rule the tokenizer's bos_token_id.
      context: at least 2.

    Raises:
      InputError: `context` is below 2, or the text does not fill one window.
    """
    if context < 2:
        raise InputError(f"context is {context}; it must be 2 or more")
    text = tokens[1:] if len(tokens) and int(tokens[0]) == begin else tokens
    rows = len(text) // (context - 1)
    if rows < 1:
        raise InputError(f"the text has {len(text)} tokens, a window of {context} takes {context - 1}; give more text")
    parts = np.asarray(text[: rows * (context - 1)], np.int32).reshape(rows, context - 1)
    return np.concatenate([np.full((rows, 1), begin, np.int32), parts], axis=1).reshape(-1)


def calibration_samples(
    tokens: np.ndarray,
    *,
    samples: int,
    length: int,
    seed: int,
    sample_offsets: np.ndarray | None = None,
    begin: int | None = None,
) -> np.ndarray:
    """Returns int32 [samples, length], crops of a token stream.

    Args:
      tokens: int [tokens].
      samples: at least 1.
      length: tokens per sample, at least 2.
      seed: of numpy's default generator (PCG64), which draws the offsets uniformly and independently from
        0 … tokens-length; crops may overlap. Unused where offsets are given.
      sample_offsets: int [at least samples]; sample s is the `length` tokens from sample_offsets[s] on.
      begin: a token that takes the place of each sample's first, see `begin_windows`; None: none does.

    Raises:
      InputError: too few tokens or offsets, or an offset outside its range; both values are named.
    """
    if samples < 1 or length < 2:
        raise InputError(f"calibration needs samples >= 1 and length >= 2, not {samples} and {length}")
    if len(tokens) < length:
        raise InputError(f"the calibration text has {len(tokens)} tokens, one sample needs {length}; give more text")
    last = len(tokens) - length
    if sample_offsets is None:
        sample_offsets = np.random.default_rng(seed).integers(0, last, size=samples, endpoint=True)
    elif len(sample_offsets) < samples:
        raise InputError(f"{len(sample_offsets)} start positions for {samples} samples; give as many or fewer samples")
    sample_offsets = np.asarray(sample_offsets, dtype=np.int64)[:samples]
    if sample_offsets.min() < 0 or sample_offsets.max() > last:
        worst = int(sample_offsets.min()) if sample_offsets.min() < 0 else int(sample_offsets.max())
        raise InputError(f"start position {worst} is outside 0 … {last} ({len(tokens)} tokens, samples of {length})")
    crops = np.stack([np.asarray(tokens[start : start + length], dtype=np.int32) for start in sample_offsets])
    if begin is not None:
        crops[:, 0] = begin
    return crops
