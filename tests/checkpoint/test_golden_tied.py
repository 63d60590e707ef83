"""The committed checkpoint of format version 2, with a codebook of two kernels, loads for ever to its bytes."""

import json

import numpy as np
from digests import digest
from paths import FIXTURES

from cluscomp_jax.checkpoint.reader import load_checkpoint
from cluscomp_jax.core import trees
from cluscomp_jax.core.codebook import decode

GOLDEN = FIXTURES / "golden_v2"
OWNER, OTHER = "mlp/up_proj/kernel", "mlp/gate_proj/kernel"

# Printed by scripts/make_golden.py --tied from the parameters it made, not from what it saved.
PINNED = {
    OWNER: "42224884dac8b6e5e73c968e73ffafa62fbff932a3c0d04274a006644d99e946",
    OTHER: "8a8d00e9020a5a3d4cfd35191dfa7d6f45b30c8cf3af1cb8d403e90d16acf790",
}


def test_two_kernels_have_the_codebook_that_one_of_them_stores() -> None:
    assert json.loads((GOLDEN / "manifest.json").read_text())["format_version"] == 2
    flat = trees.flatten(load_checkpoint(GOLDEN).params)
    kernels = {path: flat[f"model/layers/0/{path}"] for path in PINNED}
    found = {path: digest(kernel) for path, kernel in kernels.items()}
    assert found == PINNED
    owner, other = kernels[OWNER], kernels[OTHER]
    assert (owner.tied_to, other.tied_to) == (None, OWNER)
    np.testing.assert_array_equal(owner.codebook, other.codebook)
    by_hand = np.asarray(owner.codebook)[np.asarray(other.index)].reshape(8, -1)[:, :12]
    np.testing.assert_array_equal(decode(other), by_hand)
