"""The table of tensor names: Flax path ↔ Hugging Face name ↔ GGUF name, for the llama families.

Knows names and orientations, not files, and not which tensors a model has: that is the Model's to say.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from cluscomp_jax.errors import InputError
from cluscomp_jax.models.model import Model, parameter_shapes

_REST = (
    # Flax module, Hugging Face module, GGUF module, Flax name of its stored "weight"
    ("model/embed_tokens", "model.embed_tokens", "token_embd", "embedding"),
    ("model/norm", "model.norm", "output_norm", "weight"),
    ("lm_head", "lm_head", "output", "kernel"),
)
_BLOCK = (
    ("input_layernorm", "input_layernorm", "attn_norm", "weight"),
    ("self_attn/q_proj", "self_attn.q_proj", "attn_q", "kernel"),
    ("self_attn/k_proj", "self_attn.k_proj", "attn_k", "kernel"),
    ("self_attn/v_proj", "self_attn.v_proj", "attn_v", "kernel"),
    ("self_attn/o_proj", "self_attn.o_proj", "attn_output", "kernel"),
    ("self_attn/q_norm", "self_attn.q_norm", "attn_q_norm", "weight"),
    ("self_attn/k_norm", "self_attn.k_norm", "attn_k_norm", "weight"),
    ("post_attention_layernorm", "post_attention_layernorm", "ffn_norm", "weight"),
    ("mlp/gate_proj", "mlp.gate_proj", "ffn_gate", "kernel"),
    ("mlp/up_proj", "mlp.up_proj", "ffn_up", "kernel"),
    ("mlp/down_proj", "mlp.down_proj", "ffn_down", "kernel"),
)
_BLOCKS_PATH = "model/layers/"
LM_HEAD = "lm_head/kernel"
EMBEDDING = "model/embed_tokens/embedding"


@dataclass(frozen=True)
class Layout:
    """One naming of the tensors. Invariant: `path(name(p)) == p` for every path of the llama families.

    Attributes:
      block_prefix: what precedes a block's number.
      modules: {Flax module: stored module}, inside and outside the blocks.
      ignorable: a pattern of stored names that carry no parameter of ours and may be passed over.
    """

    block_prefix: str
    modules: Mapping[str, str]
    ignorable: re.Pattern[str]

    def name(self, path: str) -> str:
        """Returns the stored name of a Flax path.

        Raises:
          InputError: the path is in no row of the table.
        """
        prefix, module, leaf = "", *path.rpartition("/")[::2]
        if module.startswith(_BLOCKS_PATH):
            number, _, module = module.removeprefix(_BLOCKS_PATH).partition("/")
            prefix = f"{self.block_prefix}{number}."
        if module not in self.modules or leaf not in (_WEIGHT_LEAF[module], "bias"):
            raise InputError(f"parameter path {path!r} has no known stored name")
        return f"{prefix}{self.modules[module]}.{'bias' if leaf == 'bias' else 'weight'}"

    def path(self, name: str) -> str | None:
        """Returns the Flax path of a stored name, or None where the table has no such name."""
        module, _, leaf = name.rpartition(".")
        match = re.fullmatch(re.escape(self.block_prefix) + r"(0|[1-9]\d*)\.(.+)", module)
        in_block = match is not None
        module = match[2] if match else module
        flax = next((f for f, stored in self.modules.items() if stored == module), None)
        if flax is None or leaf not in ("weight", "bias") or in_block != (flax in _BLOCK_MODULES):
            return None
        prefix = f"{_BLOCKS_PATH}{match[1]}/" if match else ""
        return f"{prefix}{flax}/{'bias' if leaf == 'bias' else _WEIGHT_LEAF[flax]}"


_WEIGHT_LEAF = {flax: leaf for flax, _, _, leaf in (*_REST, *_BLOCK)}
_BLOCK_MODULES = frozenset(flax for flax, *_ in _BLOCK)

HUGGING_FACE = Layout(
    block_prefix="model.layers.",
    modules={flax: hf for flax, hf, _, _ in (*_REST, *_BLOCK)},
    ignorable=re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq"),
)
GGUF = Layout(
    block_prefix="blk.",
    modules={flax: gguf for flax, _, gguf, _ in (*_REST, *_BLOCK)},
    # rope_freqs holds the Llama 3 rope scaling, which is read into the config, not among the parameters.
    ignorable=re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight"),
)


def is_transposed(path: str) -> bool:
    """Returns whether a parameter is stored [d_out, d_in] where Flax has [d_in, d_out]."""
    return path.endswith("/kernel")


def to_flax(path: str, stored: np.ndarray) -> np.ndarray:
    """Returns a stored tensor in Flax orientation, contiguous; kernels [d_out, d_in] -> [d_in, d_out]."""
    return np.ascontiguousarray(stored.T) if is_transposed(path) else stored


def match_tensors(
    found: Mapping[str, Iterable[int]], model: Model, layout: Layout, where: str
) -> tuple[dict[str, str], str | None]:
    """Holds the tensors of a file against what the model needs.

    Args:
      found: {stored name: shape in row-major order}, as the file has them.
      model: says which parameters there must be, and their shapes.
      layout: the naming of the file.
      where: the file or folder, for errors.

    Returns:
      ({Flax path: stored name} of every parameter, the stored name of an output head
      that is stored although embeddings are tied, or None).

    Raises:
      InputError: a tensor is missing, unused or of another shape; the line names it.
    """
    expected = parameter_shapes(model)
    names: dict[str, str] = {}
    tied_head = None
    for name, stored in found.items():
        if layout.ignorable.fullmatch(name):
            continue
        path = layout.path(name)
        if path == LM_HEAD and path not in expected:
            tied_head = name
            continue
        if path is None or path not in expected:
            raise InputError(
                f"{where}: tensor {name} {list(stored)} is used by nothing; do config and file belong together?"
            )
        want = expected[path][::-1] if is_transposed(path) else expected[path]
        if tuple(stored) != tuple(want):
            raise InputError(f"{where}: tensor {name} has shape {list(stored)}, the model config needs {list(want)}")
        names[path] = name
    missing = [layout.name(path) for path in expected if path not in names]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{where}: tensor {missing[0]}{more} is missing; the model config needs it")
    return names, tied_head


def require_finite(array: np.ndarray, name: str, where: str) -> None:
    """Raises InputError naming the tensor if any value is NaN or infinite."""
    require_none(count_not_finite(array), array.size, name, where)


def count_not_finite(array: np.ndarray) -> int:
    """Returns how many values are NaN or infinite."""
    return int(array.size - np.count_nonzero(np.isfinite(array)))


def require_none(bad: int, size: int, name: str, where: str) -> None:
    """Raises InputError naming the tensor of `size` values where `bad` of them, NaN or infinite, are not 0."""
    if bad:
        raise InputError(f"{where}: tensor {name} holds {bad} NaN or infinite values of {size}; fetch it again")
