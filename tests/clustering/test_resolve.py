"""What is refused before any work: results that are larger than what they replace."""

import pytest
from small_llamas import WINDOWED, random_params

from cluscomp_jax import CompressConfig, InputError, compress


def test_codebooks_larger_than_what_they_replace_are_refused():
    message = (
        r"bits per weight, more than the 32 of float32: codebooks are larger than what they replace; lower num_codes"
    )
    with pytest.raises(InputError, match=message):
        compress(random_params(WINDOWED), CompressConfig(model=WINDOWED))
