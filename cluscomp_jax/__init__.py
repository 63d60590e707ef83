"""ClusComp in JAX: compress decoder-only language models by clustering, repair them block by block, run them.

The names below load on first use, so that a command line that only checks its arguments answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluscomp_jax.checkpoint.reader import load_checkpoint, save_checkpoint
    from cluscomp_jax.checkpoint.saved_trees import load, save
    from cluscomp_jax.clustering.host_hessians import collect_hessians
    from cluscomp_jax.clustering.matrix import SizeReport, decompress, size_report
    from cluscomp_jax.clustering.tree import abstract, cluster_tree
    from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
    from cluscomp_jax.config.data import CalibrationConfig, DataConfig
    from cluscomp_jax.config.finetune import FinetuneConfig, load_finetune_config
    from cluscomp_jax.config.recovery import RecoveryConfig
    from cluscomp_jax.config.run import CompressConfig, load_config
    from cluscomp_jax.config.training import DistillationConfig, TrainingConfig
    from cluscomp_jax.config.tuning import BlockTuningConfig
    from cluscomp_jax.core.codebook import CodebookArray, decode
    from cluscomp_jax.core.linear import linear
    from cluscomp_jax.core.masters import combine, partition, rounded
    from cluscomp_jax.core.stacking import stack, unstack
    from cluscomp_jax.errors import InputError
    from cluscomp_jax.evaluation.perplexity import Perplexity, perplexity
    from cluscomp_jax.finetuning import finetune
    from cluscomp_jax.foreign_blocks import compress_blocks
    from cluscomp_jax.inference.decoder import generate
    from cluscomp_jax.io.open import open_model
    from cluscomp_jax.kmeans import fit_codebook
    from cluscomp_jax.models import layouts, llama
    from cluscomp_jax.models.calibration import Embeddings
    from cluscomp_jax.models.llama import LlamaConfig
    from cluscomp_jax.pipeline import compress
    from cluscomp_jax.text.text import calibration_samples, load_tokens
    from cluscomp_jax.text.token_rows import TokenRows
    from cluscomp_jax.tracing.evaluate import count_products
    from cluscomp_jax.tracing.with_codebooks import with_codebooks

_HOMES = {
    "BlockTuningConfig": "config.tuning",
    "CalibrationConfig": "config.data",
    "ClusterConfig": "config.clustering",
    "CodebookArray": "core.codebook",
    "CompressConfig": "config.run",
    "CompressionRule": "config.clustering",
    "DataConfig": "config.data",
    "DistillationConfig": "config.training",
    "Embeddings": "models.calibration",
    "FinetuneConfig": "config.finetune",
    "InputError": "errors",
    "LlamaConfig": "models.llama",
    "Perplexity": "evaluation.perplexity",
    "RecoveryConfig": "config.recovery",
    "SizeReport": "clustering.matrix",
    "TokenRows": "text.token_rows",
    "TrainingConfig": "config.training",
    "abstract": "clustering.tree",
    "calibration_samples": "text.text",
    "cluster_tree": "clustering.tree",
    "collect_hessians": "clustering.host_hessians",
    "combine": "core.masters",
    "compress_blocks": "foreign_blocks",
    "count_products": "tracing.evaluate",
    "compress": "pipeline",
    "decompress": "clustering.matrix",
    "decode": "core.codebook",
    "finetune": "finetuning",
    "fit_codebook": "kmeans",
    "generate": "inference.decoder",
    "linear": "core.linear",
    "load": "checkpoint.saved_trees",
    "load_checkpoint": "checkpoint.reader",
    "load_config": "config.run",
    "load_finetune_config": "config.finetune",
    "load_tokens": "text.text",
    "open_model": "io.open",
    "partition": "core.masters",
    "perplexity": "evaluation.perplexity",
    "rounded": "core.masters",
    "save": "checkpoint.saved_trees",
    "save_checkpoint": "checkpoint.reader",
    "size_report": "clustering.matrix",
    "stack": "core.stacking",
    "unstack": "core.stacking",
    "with_codebooks": "tracing.with_codebooks",
}

__all__ = [
    "BlockTuningConfig",
    "CalibrationConfig",
    "ClusterConfig",
    "CodebookArray",
    "CompressConfig",
    "CompressionRule",
    "DataConfig",
    "DistillationConfig",
    "Embeddings",
    "FinetuneConfig",
    "InputError",
    "LlamaConfig",
    "Perplexity",
    "RecoveryConfig",
    "SizeReport",
    "TokenRows",
    "TrainingConfig",
    "abstract",
    "calibration_samples",
    "cluster_tree",
    "collect_hessians",
    "combine",
    "compress",
    "compress_blocks",
    "count_products",
    "decode",
    "decompress",
    "finetune",
    "fit_codebook",
    "generate",
    "layouts",
    "linear",
    "llama",
    "load",
    "load_checkpoint",
    "load_config",
    "load_finetune_config",
    "load_tokens",
    "open_model",
    "partition",
    "perplexity",
    "rounded",
    "save",
    "save_checkpoint",
    "size_report",
    "stack",
    "unstack",
    "with_codebooks",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name == "__version__":
        value = importlib.import_module(f"{__name__}._version").version("cluscomp-jax")
    elif name in ("layouts", "llama"):
        return importlib.import_module(f"{__name__}.models.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
