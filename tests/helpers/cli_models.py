"""A tiny Hugging Face model with a tokenizer of single characters, and texts for it. Its weights are random."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from io_models import config_fields, hf_tensors, write_hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CHARACTERS = "abcdefghijklmnopqrstuvwxyz .,!?\n"


def tensors(**options: Any) -> dict[str, np.ndarray]:
    """Weights of the size that training gives, so that perplexities are finite and gradients small."""
    return {
        name: array if array.ndim == 1 and "norm" not in name else 0.1 * array + (array.ndim == 1)
        for name, array in hf_tensors(**options).items()
    }


def write_tokenizer(folder: Path) -> None:
    vocabulary = {character: i for i, character in enumerate(["<unk>", "</s>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def write_model(folder: Path, **changes: Any) -> Path:
    write_hf(folder, config_fields(**changes), tensors())
    write_tokenizer(folder)
    return folder


def write_text(path: Path, characters: int, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    path.write_text("".join(random.choice(list(CHARACTERS), size=characters)))
    return path
