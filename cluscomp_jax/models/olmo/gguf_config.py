"""What OLMo 2 and 3 add to the fields of a GGUF header: both are called olmo2 there, and windows make OLMo 3."""

from typing import Any

from cluscomp_jax.errors import InputError
from cluscomp_jax.models.decoder.config import FULL, SLIDING
from cluscomp_jax.models.gguf_header import GgufHeader


def gguf_fields(header: GgufHeader) -> dict[str, Any]:
    """Returns the windows of OLMo 3, and its model_type; nothing for OLMo 2.

    Raises:
      InputError: the pattern of windows is no list of true and false.
    """
    if not header.has("attention.sliding_window"):
        return {}
    key = f"{header.architecture}.attention.sliding_window_pattern"
    pattern = header.metadata.get(key)
    if pattern is not None and not (isinstance(pattern, list) and all(isinstance(one, bool) for one in pattern)):
        raise InputError(f"{key} in the GGUF header is {str(pattern)[:60]}; a list of true and false is expected")
    types = None if pattern is None else [SLIDING if slides else FULL for slides in pattern]
    return {
        "model_type": "olmo3",
        "sliding_window": header.number("attention.sliding_window"),
        "layer_types": types,
    }
