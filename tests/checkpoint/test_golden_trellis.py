"""The committed checkpoint of format version 3, with trellis indices, loads for ever to the bytes it was made of."""

from digests import digest
from paths import FIXTURES

from cluscomp_jax.checkpoint.reader import load_checkpoint
from cluscomp_jax.core import trees
from cluscomp_jax.core.coding import PLAIN, TrellisCoding

GOLDEN = FIXTURES / "golden_v3"

# Printed by scripts/make_golden.py from the parameters it made, not from what it saved.
PINNED = {
    "mlp/down_proj/kernel": "5725120ec2afe572a463313e3a3c58cd41c0760cafad56eb215af5832ff54de5",
    "mlp/gate_proj/kernel": "7702e5fd7b8f1b58496716a5821060ad5abcb2508b8c2ca26221202b3ba2ce29",
    "mlp/up_proj/kernel": "fe139e05e8340f940ddfe628fd19f6faa15dd900790ca6bd8fae15ba51d347d8",
    "self_attn/k_proj/kernel": "1bd0a047d7aeddfe4b961124ced75176480a85e43daa74590a8aed879b760b81",
    "self_attn/o_proj/kernel": "55f87d7589df9742439511733d5b1f082fe007c698d1452c70e6e377970c7b9a",
    "self_attn/q_proj/kernel": "39c43f3c6f218172e192492b40d7b23447f2c343dd211d74a1f707b170093e81",
    "self_attn/v_proj/kernel": "19c1bf2f69434da7c0167fd1e920fc80eeee75f9f351d179263af5e3b50992bc",
}
CODINGS = dict.fromkeys(PINNED, PLAIN) | {
    "self_attn/k_proj/kernel": TrellisCoding(2),
    "self_attn/v_proj/kernel": TrellisCoding(5),
    "mlp/gate_proj/kernel": TrellisCoding(3),
}


def test_every_kernel_is_the_one_that_was_saved_in_its_coding() -> None:
    flat = trees.flatten(load_checkpoint(GOLDEN).params)
    kernels = {path: flat[f"model/layers/0/{path}"] for path in PINNED}
    found = {path: digest(kernel) for path, kernel in kernels.items()}
    assert found == PINNED
    assert {path: kernel.coding for path, kernel in kernels.items()} == CODINGS
