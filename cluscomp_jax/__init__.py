"""ClusComp in JAX: compress decoder-only language models by clustering, repair them block by block, run them.

The names below load on first use, so that a command line that only checks its arguments answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluscomp_jax import llama
    from cluscomp_jax.cluster import SizeReport, decompress, size_report
    from cluscomp_jax.codebook import CodebookArray
    from cluscomp_jax.config import RunConfig, load_config
    from cluscomp_jax.errors import InputError
    from cluscomp_jax.evaluate import Perplexity, perplexity
    from cluscomp_jax.examples import Examples
    from cluscomp_jax.finetune_config import FinetuneConfig, load_finetune_config
    from cluscomp_jax.finetuning import finetune
    from cluscomp_jax.generation import generate
    from cluscomp_jax.io.checkpoint import load_checkpoint, save_checkpoint
    from cluscomp_jax.io.open import open_model
    from cluscomp_jax.pipeline import compress
    from cluscomp_jax.settings import (
        CalibrationSettings,
        ClusterSettings,
        CompressionRule,
        DataSettings,
        DistillationSettings,
        TrainingSettings,
        TuningSettings,
    )

_HOMES = {
    "CalibrationSettings": "settings",
    "ClusterSettings": "settings",
    "CodebookArray": "codebook",
    "CompressionRule": "settings",
    "DataSettings": "settings",
    "DistillationSettings": "settings",
    "Examples": "examples",
    "FinetuneConfig": "finetune_config",
    "InputError": "errors",
    "Perplexity": "evaluate",
    "RunConfig": "config",
    "SizeReport": "cluster",
    "TrainingSettings": "settings",
    "TuningSettings": "settings",
    "compress": "pipeline",
    "decompress": "cluster",
    "finetune": "finetuning",
    "generate": "generation",
    "load_checkpoint": "io.checkpoint",
    "load_config": "config",
    "load_finetune_config": "finetune_config",
    "open_model": "io.open",
    "perplexity": "evaluate",
    "save_checkpoint": "io.checkpoint",
    "size_report": "cluster",
}

__all__ = [
    "CalibrationSettings",
    "ClusterSettings",
    "CodebookArray",
    "CompressionRule",
    "DataSettings",
    "DistillationSettings",
    "Examples",
    "FinetuneConfig",
    "InputError",
    "Perplexity",
    "RunConfig",
    "SizeReport",
    "TrainingSettings",
    "TuningSettings",
    "compress",
    "decompress",
    "finetune",
    "generate",
    "llama",
    "load_checkpoint",
    "load_config",
    "load_finetune_config",
    "open_model",
    "perplexity",
    "save_checkpoint",
    "size_report",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name == "llama":
        return importlib.import_module(f"{__name__}.llama")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
