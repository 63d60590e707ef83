"""transformers, imported without its advice about PyTorch. Knows nothing else."""

import importlib
import logging
from typing import Any


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
        return importlib.import_module("transformers")
    finally:
        logger.removeFilter(advice)
