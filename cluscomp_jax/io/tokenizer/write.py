"""A tokenizer as the files of a Hugging Face folder, such that every release of transformers reads the same one."""

import json
from pathlib import Path
from typing import Any

from cluscomp_jax.io.tokenizer.folder import NO_LIMIT, ROLES, TOKENIZER_CONFIG, TOKENIZER_JSON

_CLASS = "PreTrainedTokenizerFast"
"""The class that takes tokenizer.json as it is, whatever the model_type of a config.json in the same folder."""


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, the chat template in the latter.

    Args:
      tokenizer: as `load_tokenizer` returns it.
      folder: exists; files of these names are replaced.
    """
    if not getattr(tokenizer, "is_fast", False):
        tokenizer.save_pretrained(folder)
        return
    tokenizer.backend_tokenizer.save(str(folder / TOKENIZER_JSON))
    fields: dict[str, Any] = {"tokenizer_class": _CLASS}
    fields |= {role: str(token) for role in ROLES if (token := getattr(tokenizer, role, None)) is not None}
    fields["clean_up_tokenization_spaces"] = bool(tokenizer.clean_up_tokenization_spaces)
    if tokenizer.model_max_length < NO_LIMIT:
        fields["model_max_length"] = tokenizer.model_max_length
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template is not None:
        fields["chat_template"] = template
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
