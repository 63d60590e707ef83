"""What is refused before any work: results that are larger than what they replace."""

import pytest
from small_llamas import WINDOWED, random_params

from cluscomp_jax import ClusterConfig, CompressConfig, InputError, compress


def test_codebooks_larger_than_what_they_replace_are_refused():
    message = (
        r"bits per weight, more than the 32 of float32: codebooks are larger than what they replace; lower num_codes"
    )
    with pytest.raises(InputError, match=message):
        compress(random_params(WINDOWED), CompressConfig(model=WINDOWED))


def test_a_budget_of_what_a_weight_takes_uncompressed_is_refused():
    with pytest.raises(InputError, match="bits is 99; it must be below 16, what a weight takes in bfloat16"):
        compress(random_params(WINDOWED), CompressConfig(model=WINDOWED, cluster=ClusterConfig(bits=99), tuning=None))
