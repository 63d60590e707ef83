"""What comes from Hugging Face: the module transformers, without its advice about PyTorch, and models of the hub."""

import importlib
import logging
import textwrap
from pathlib import Path
from typing import Any

from cluscomp_jax.errors import InputError
from cluscomp_jax.runtime.extras import needed_for

_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


class _DropPyTorchAdvice(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()


def transformers() -> Any:
    """Returns the module `transformers`, imported on first use because that takes a second.

    On import it warns that PyTorch is absent; tokenizers do not need it, so that one line is dropped.
    """
    logger, advice = logging.getLogger("transformers"), _DropPyTorchAdvice()
    logger.addFilter(advice)
    try:
        with needed_for("a tokenizer", "hf"):
            return importlib.import_module("transformers")
    finally:
        logger.removeFilter(advice)


def download(hub_id: str) -> Path:
    """Returns the folder of a model's files and tokenizer, downloaded or taken from the local cache.

    Args:
      hub_id: "owner/name".

    Raises:
      InputError: it is in neither, or the hub does not answer.
    """
    with needed_for(f"model {hub_id!r} of the hub", "hf"):
        import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(_HUB_FILES), ignore_patterns=["*/*"]))
    except (OSError, ValueError, huggingface_hub.errors.HFValidationError) as error:
        reason = textwrap.shorten(str(error), 160, placeholder=" …")
        if isinstance(error, huggingface_hub.errors.LocalEntryNotFoundError):
            reason = "it does not answer, and nothing is cached; give a local folder"
        raise InputError(f"model {hub_id!r} is no folder here and cannot be had from the hub: {reason}") from None
