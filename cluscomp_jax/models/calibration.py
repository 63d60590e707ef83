"""Calibration samples: tokens, or what the first block reads in their place. Knows no stage that uses them."""

import dataclasses
import hashlib
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cluscomp_jax.errors import InputError
from cluscomp_jax.models.model import Model, check_tokens, width

NO_TOKEN = -1
"""The entry of `Embeddings.tokens` for a position that is no token: of an image, or padding."""


@dataclasses.dataclass(frozen=True, eq=False)
class Embeddings:
    """Calibration on what the first block reads: token embeddings, and those of images or sounds between them.

    Positions that are not valid are padding: they count nowhere, and no valid position attends to them. `packed` moves
    them to the end of their sample, so that the valid ones have the places that they have in the model.

    Attributes:
      inputs: floating [samples, t, d], the output of the embedding, or of what replaces it.
      mask: bool [samples, t], which positions are valid; None: all.
      tokens: int [samples, t], the token of each position, -1 where it is none: the labels of the loss by which a bit
        budget is spent (`ClusterConfig.mixed_precision`). None: there are none, and a budget is spent evenly.

    Raises:
      InputError: shapes, dtypes or values that do not fit, or a mask that leaves nothing of a sample.
    """

    inputs: np.ndarray
    mask: np.ndarray | None = None
    tokens: np.ndarray | None = None

    def __post_init__(self) -> None:
        x = np.asarray(self.inputs)
        object.__setattr__(self, "inputs", x)
        if x.dtype.kind in "iubcOSU" or x.ndim != 3 or 0 in x.shape:
            raise InputError(
                f"calibration embeddings are {x.dtype} {list(x.shape)}; they must be floating [samples, t, channels]"
            )
        if self.mask is not None:
            object.__setattr__(self, "mask", _checked_mask(np.asarray(self.mask), x.shape[:2]))
        if self.tokens is not None:
            tokens = np.asarray(self.tokens)
            if tokens.dtype.kind not in "iu" or tokens.shape != x.shape[:2]:
                raise InputError(
                    f"calibration tokens are {tokens.dtype} {list(tokens.shape)}; the embeddings' must be integers "
                    f"{list(x.shape[:2])}, {NO_TOKEN} where a position is no token"
                )
            object.__setattr__(self, "tokens", tokens)
        for i, sample in enumerate(x):
            valid = sample if self.mask is None else sample[self.mask[i]]
            if not np.isfinite(valid.astype(np.float32)).all():
                raise InputError(f"calibration embeddings: sample {i} holds NaN or Inf at valid positions")

    @property
    def shape(self) -> tuple[int, int]:
        """(samples, positions of a sample)."""
        return self.inputs.shape[0], self.inputs.shape[1]

    @cached_property
    def weights(self) -> np.ndarray | None:
        """float32 [samples, t]: 0 at padding and one number elsewhere, 1 on average; None: there is no padding."""
        if self.mask is None or self.mask.all():
            return None
        return (self.mask / self.mask.mean()).astype(np.float32)

    def packed(self) -> "Embeddings":
        """Returns the same, the valid positions of each sample in their order at its beginning, zeros after them."""
        if self.mask is None:
            return self
        if self.mask.all():
            return Embeddings(self.inputs, None, self.tokens)
        counts = self.mask.sum(axis=1)
        mask = np.arange(counts.max()) < counts[:, None]
        inputs = np.zeros((*mask.shape, self.inputs.shape[2]), self.inputs.dtype)
        inputs[mask] = self.inputs[self.mask]
        tokens = None
        if self.tokens is not None:
            tokens = np.full(mask.shape, NO_TOKEN, np.int32)
            tokens[mask] = self.tokens[self.mask]
        return Embeddings(inputs, None if mask.all() else mask, tokens)

    def digest(self) -> str:
        """Returns the SHA-256 of everything in it."""
        digest = hashlib.sha256()
        for array in (self.inputs, self.mask, self.tokens):
            if array is not None:
                digest.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
            digest.update(b";")
        return digest.hexdigest()


Calibration = np.ndarray | Embeddings
"""Tokens int [samples, length], or embeddings."""


def digest_of(calibration: Calibration | None) -> str | None:
    """Returns the SHA-256 of calibration samples; None: there are none."""
    if calibration is None or isinstance(calibration, Embeddings):
        return None if calibration is None else calibration.digest()
    return hashlib.sha256(calibration.astype("<i4").tobytes()).hexdigest()


def first_samples(calibration: Calibration, count: int) -> Calibration:
    """Returns the first `count` samples."""
    if not isinstance(calibration, Embeddings):
        return calibration[:count]
    mask, tokens = (None if array is None else array[:count] for array in (calibration.mask, calibration.tokens))
    return Embeddings(calibration.inputs[:count], mask, tokens)


def has_labels(calibration: Calibration | None) -> bool:
    """Returns whether a loss of next tokens can be measured on the samples."""
    return calibration is not None and not (isinstance(calibration, Embeddings) and calibration.tokens is None)


def check_embeddings(embeddings: Embeddings, model: Model) -> None:
    """Raises InputError where embeddings have another width than the model, or tokens outside its vocabulary."""
    found, wanted = embeddings.inputs.shape[2], width(model)
    if found != wanted:
        raise InputError(
            f"calibration embeddings have width {found}, the model's blocks read {wanted}; were they made with another "
            "model?"
        )
    if embeddings.tokens is not None:
        check_tokens(np.maximum(embeddings.tokens, 0), model, "calibration")
        if embeddings.tokens.min() < NO_TOKEN:
            raise InputError(f"calibration: token {embeddings.tokens.min()}; a position without one is {NO_TOKEN}")


def is_embeddings(spec: str) -> bool:
    """Returns whether a calibration text is named by the file of its embeddings."""
    return spec.endswith(".npz")


def read_embeddings(path: str | Path) -> Embeddings:
    """Returns the Embeddings of a .npz file: arrays "inputs" and, as they are there, "mask" and "tokens".

    Raises:
      InputError: it cannot be read, lacks "inputs", has other arrays, or they do not fit; the file is named.
    """
    names = [field.name for field in dataclasses.fields(Embeddings)]
    try:
        with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays: dict[str, Any] = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        # NumPy takes whatever it does not know for pickled objects, and its text advises to unpickle them.
        pickled = isinstance(error, ValueError) and "pickle" in str(error)
        reason = "it is no .npz file, or has objects, which are never unpickled" if pickled else error
        raise InputError(f"{path}: not read as embeddings (.npz): {reason}") from None
    if "inputs" not in arrays or arrays.keys() - set(names):
        raise InputError(f"{path} has the arrays {sorted(arrays)}; inputs is needed, mask and tokens may be there")
    try:
        return Embeddings(**arrays)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _checked_mask(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if mask.shape != shape or not (mask.dtype == np.bool_ or np.isin(mask, (0, 1)).all()):
        raise InputError(
            f"calibration mask is {mask.dtype} {list(mask.shape)}; it must be bool, or 0 and 1, {list(shape)} as the "
            "embeddings"
        )
    mask = mask.astype(np.bool_)
    if empty := np.flatnonzero(~mask.any(axis=1)).tolist():
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise InputError(f"calibration mask leaves no position of sample {empty[0]}{more}; leave the sample out")
    return mask
