"""Use of the codes and kurtosis of the weights of every matrix of a finished checkpoint. Holds one block in memory."""

import dataclasses

import numpy as np

from cluscomp_jax.checkpoint.reader import CheckpointSource
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import CodebookArray
from cluscomp_jax.models.model import build_model


@dataclasses.dataclass(frozen=True)
class CodeUse:
    """How the index of one matrix uses its codes.

    Attributes:
      used: share of the codes that the index names at least once, 0 to 1.
      effective: 2**entropy of the index over the number of codes, 0 to 1; 1 where all codes are used equally often.
      kurtosis: E[(w - mean)^4] / variance^2 of the decoded weights, 3 for a normal distribution; NaN where all
        weights are equal. The padding of the cut axis counts as weights.
    """

    used: float
    effective: float
    kurtosis: float


def code_use(matrix: CodebookArray) -> CodeUse:
    """Returns the use of the codes of a matrix, computed from its codebook and the count of each code in its index."""
    table = np.asarray(matrix.codebook, np.float64)
    counts = np.bincount(
        np.asarray(matrix.coding.codes(matrix.form, matrix.index)).reshape(-1), minlength=len(table)
    ).astype(np.float64)
    share = counts / counts.sum()
    entropy = -float(np.sum(share[share > 0] * np.log2(share[share > 0])))
    each = share[:, None] / table.shape[1]
    mean = np.sum(each * table)
    variance = np.sum(each * np.square(table - mean))
    fourth = np.sum(each * np.power(table - mean, 4))
    kurtosis = float(fourth / np.square(variance)) if variance > 0 else float("nan")
    return CodeUse(float(np.mean(counts > 0)), 2**entropy / len(table), kurtosis)


def code_uses(source: CheckpointSource) -> dict[str, CodeUse]:
    """Returns {full path: use} of all compressed matrices in the blocks.

    Raises:
      InputError: a file of the checkpoint is damaged.
    """
    model = build_model(source.model_config)
    found = {}
    for i in range(model.num_blocks):
        for path, leaf in trees.iterate(source.load_block(i), f"{model.blocks_path}/{i}"):
            if isinstance(leaf, CodebookArray):
                found[path] = code_use(leaf)
    return found
