"""The Model protocol, through which the upper layers use a decoder, and the table model_type -> family.

Knows no family's internals: a family is a module with `parse_config(dict) -> config`, its inverse
`to_hf_dict(config) -> dict`, `build(config) -> Model` and, to be read from and written to the files of others,
`TENSOR_NAMES` ({form: TensorNames}, see `models/tensor_names.py`) and `gguf_fields(GgufHeader) -> dict`
(`models/gguf_header.py`).
"""

import importlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from cluscomp_jax.core import trees
from cluscomp_jax.core.trees import Params
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.nesting import NESTINGS, nesting_of, text_fields

Cache = dict[str, jax.Array]
Observer = Callable[[str, jax.Array, jax.Array | None, jax.Array | None], Any]
"""Called as observer(group, x [..., d_in], residual [..., d] or None, weights float32 [...] or None): the name of an
input group, the input x of its projections, the residual that their output is added to, if there is one, and how much
an error of their output counts at each position, None being 1. `Model.block` returns its results."""


@runtime_checkable
class Model(Protocol):
    """Pure functions of one decoder. Implementations are frozen and hashable: they serve as static jit arguments.

    Letters: b batch, t time, d model width, v vocabulary. The dtype of x is the compute dtype; softmax, norms
    and logits are computed in float32 whatever it is.
    """

    @property
    def config(self) -> Any:
        """The family's frozen config; it has at least `model_type` and `vocab_size`."""
        ...

    @property
    def num_blocks(self) -> int:
        """Number of decoder blocks."""
        ...

    @property
    def blocks_path(self) -> str:
        """The path under which the parameters have blocks "0", "1", …, e.g. "model/layers"."""
        ...

    @property
    def input_groups(self) -> Mapping[str, tuple[str, ...]]:
        """{input group: block-relative paths of the kernels that read one input}, in order of computation."""
        ...

    @property
    def independent_groups(self) -> Sequence[tuple[str, ...]]:
        """The input groups in order of computation; those of one tuple do not depend on one another's kernels."""
        ...

    @property
    def row_parallel(self) -> frozenset[str]:
        """Block-relative paths of the kernels that tensor parallelism splits along their inputs; along their outputs
        all others (Megatron-LM, arXiv 1909.08053, section 3)."""
        ...

    def layer_type(self, i: int) -> Hashable:
        """What distinguishes block i's program in addition to its shapes (its attention window, for example)."""
        ...

    def block_shapes(self, i: int) -> dict[str, tuple[int, ...]]:
        """{block-relative path: shape} of block i's dense parameters."""
        ...

    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """{path: shape} of all parameters outside the blocks."""
        ...

    def arranged(self, params: Params) -> Params:
        """A block's parameters as `cached_block` runs fastest with them; it takes both."""
        ...

    def embed(self, outer: Params, tokens: jax.Array, *, dtype: Any, position: Any = None) -> jax.Array:
        """tokens int [b, t] -> x [b, t, d] of `dtype`.

        `position` is that of the first column, a number or int [b]; then columns past a table of learned positions are
        padding, and mean nothing. None: 0, and no column is padding. Models without such a table have no use for it.
        """
        ...

    def block(self, params: Params, x: jax.Array, *, layer_type: Hashable, observer: Observer | None = None) -> Any:
        """x [b, t, d] -> y [b, t, d]; with an observer, (y, {group: what the observer returns})."""
        ...

    def head(self, outer: Params, x: jax.Array) -> jax.Array:
        """x [b, t, d] -> logits float32 [b, t, v]."""
        ...

    def init_cache(self, i: int, batch: int, length: int, dtype: Any) -> Cache:
        """The empty key-value cache of block i for `length` positions."""
        ...

    def cached_block(
        self,
        params: Params,
        x: jax.Array,
        cache: Cache,
        position: jax.Array | int,
        *,
        layer_type: Hashable,
        length: jax.Array | int | None = None,
    ) -> tuple[jax.Array, Cache]:
        """x [b, t, d] at positions position … position+t-1 against the cache -> (y, cache with them written).

        `length` is the number of positions of the sequence after this call, less than position + t where x is padded
        at its end; None: position + t. The columns of y at and past it mean nothing.
        """
        ...


_FAMILIES: dict[str, str | Any] = {
    "gemma2": "cluscomp_jax.models.gemma",
    "gemma3_text": "cluscomp_jax.models.gemma",
    "granite": "cluscomp_jax.models.granite",
    "granitemoehybrid": "cluscomp_jax.models.granite4",
    "llama": "cluscomp_jax.models.llama",
    "ministral3": "cluscomp_jax.models.ministral3",
    "mistral": "cluscomp_jax.models.llama",
    "mixtral": "cluscomp_jax.models.mixtral",
    "olmo2": "cluscomp_jax.models.olmo",
    "olmo3": "cluscomp_jax.models.olmo",
    "opt": "cluscomp_jax.models.opt",
    "phi3": "cluscomp_jax.models.phi3",
    "qwen2": "cluscomp_jax.models.llama",
    "qwen3": "cluscomp_jax.models.llama",
    "qwen3_moe": "cluscomp_jax.models.qwen3_moe",
    "seed_oss": "cluscomp_jax.models.seed_oss",
    "smollm3": "cluscomp_jax.models.smollm3",
}


_ARCHITECTURES: dict[str, str] = {"gemma3": "gemma3_text", "mistral3": "ministral3", "qwen3moe": "qwen3_moe"}
"""{architecture of a GGUF file: model_type} where they have different names."""


def register_family(model_type: str, module: Any, *, architecture: str | None = None) -> None:
    """Adds a family: `module` (or its import name) offers parse_config, to_hf_dict and build.

    Args:
      model_type: of its config.json.
      module: the family; TENSOR_NAMES and gguf_fields, where it has them, read the files of others.
      architecture: its name in GGUF files; None: the model_type.
    """
    _FAMILIES[model_type] = module
    if architecture is not None:
        _ARCHITECTURES[architecture] = model_type


def model_type_of(architecture: str) -> str:
    """Returns the model_type that an architecture of GGUF files means, served or not."""
    return _ARCHITECTURES.get(architecture, architecture)


def family_of(model_type: Any) -> Any:
    """Returns the module of a family.

    Raises:
      InputError: no family has this model_type.
    """
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise InputError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(_FAMILIES))}; "
            f"with one of these as text model: {', '.join(sorted(NESTINGS))}"
        )
    module = _FAMILIES[model_type]
    return importlib.import_module(module) if isinstance(module, str) else module


def parse_model_config(fields: Mapping[str, Any]) -> Any:
    """Returns the family's frozen config of a Hugging Face config.json mapping; of a nested one, its text model's.

    Raises:
      InputError: unknown or missing model_type, or a value the family cannot serve.
    """
    nesting = nesting_of(fields)
    if nesting is None:
        return family_of(fields.get("model_type")).parse_config(fields)
    text = text_fields(fields, nesting)
    try:
        return family_of(text["model_type"]).parse_config(text)
    except InputError as error:
        raise InputError(f"{nesting.text_config} of {fields['model_type']}: {error}") from None


def model_config_to_dict(config: Any) -> dict[str, Any]:
    """Returns the Hugging Face config.json mapping of a family's config; parse_model_config undoes it."""
    return dict(family_of(getattr(config, "model_type", None)).to_hf_dict(config))


def build_model(config: Any) -> Model:
    """Returns the Model of a family's config (anything with a `model_type`); a Model is returned as it is."""
    if isinstance(config, Model):
        return config
    if not hasattr(config, "model_type"):
        raise InputError(
            f"cfg.model must be a model config such as LlamaConfig, not {type(config).__name__}; "
            "cluscomp_jax.llama.LlamaConfig.of(it) reads configs of Hugging Face, tunix, bonsai and MaxText"
        )
    model: Model = family_of(config.model_type).build(config)
    return model


@partial(jax.jit, static_argnames=("model", "dtype"))
def run_embed(outer: Params, tokens: jax.Array, position: Any = None, *, model: Model, dtype: Any) -> jax.Array:
    """Jitted `model.embed`."""
    return model.embed(outer, tokens, dtype=dtype, position=position)


@partial(jax.jit, static_argnames=("model", "layer_type"))
def run_block(block: Params, x: jax.Array, *, model: Model, layer_type: Hashable) -> jax.Array:
    """Jitted `model.block` without an observer; compiled once per layer type and structure of block."""
    y: jax.Array = model.block(block, x, layer_type=layer_type)
    return y


def parameter_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Returns {path: shape} of all dense parameters, those outside the blocks first, then the blocks in order."""
    shapes = dict(model.outer_shapes())
    for i in range(model.num_blocks):
        shapes |= {f"{model.blocks_path}/{i}/{path}": shape for path, shape in model.block_shapes(i).items()}
    return shapes


def width(model: Model) -> int:
    """Returns d, the channels of the activations between blocks."""

    def embedded() -> jax.Array:
        outer = {path: jnp.zeros(shape, jnp.bfloat16) for path, shape in model.outer_shapes().items()}
        return model.embed(trees.unflatten(outer), jnp.zeros((1, 2), jnp.int32), dtype=jnp.bfloat16)

    return int(jax.eval_shape(embedded).shape[-1])


def check_length(length: int, model: Model, what: str) -> None:
    """Raises InputError where `length` positions, called `what`, are more than a table of learned positions has."""
    config = getattr(model, "switches", model.config)
    if getattr(config, "position_offset", None) is not None and length > config.max_position_embeddings:
        raise InputError(
            f"{what}: {length} positions, and the model has learned {config.max_position_embeddings}; make it "
            f"{config.max_position_embeddings} or less"
        )


def check_tokens(tokens: np.ndarray, model: Model, what: str) -> None:
    """Raises InputError where `tokens` (called `what` in the message) are no integers or leave the vocabulary."""
    if not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(f"{what}: dtype is {tokens.dtype}; tokens are integers")
    if tokens.size:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= model.config.vocab_size:
            wrong = high if high >= model.config.vocab_size else low
            raise InputError(
                f"{what}: token {wrong} is outside the vocabulary, 0 to {model.config.vocab_size - 1}; "
                "was it made for another model?"
            )
