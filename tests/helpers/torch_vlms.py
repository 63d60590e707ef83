"""Small random LLaVA and LLaVA-Next models of transformers, with processors, images and prompts for them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY = ["<unk>", "</s>", "<image>", *"abcdefghijklmnopqrstuvwxyz .,:"]
SIDE, PATCH = 28, 14
TEXT = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
TEXT_CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
}


def make_model(model_type: str, family: str, seed: int = 0) -> Any:
    """Every parameter random, norms and biases too, so that none is idle."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=16,
    )
    options: dict[str, Any] = {
        "vision_config": vision,
        "text_config": TEXT_CONFIGS[family](**TEXT),
        "image_token_index": VOCABULARY.index("<image>"),
        "vision_feature_layer": -2,
    }
    torch.manual_seed(seed)
    if model_type == "llava":
        model: Any = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**options))
    else:
        options["image_grid_pinpoints"] = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
        model = transformers.LlavaNextForConditionalGeneration(transformers.LlavaNextConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.1 * torch.randn_like(parameter)
            parameter.copy_(
                1 + noise if parameter.ndim == 1 and "norm" in name and "bias" not in name else parameter + noise
            )
    return model.eval()


def make_processor(model_type: str) -> Any:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="</s>", padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"shortest_edge": SIDE}
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
    }
    crop = {"height": SIDE, "width": SIDE}
    if model_type == "llava":
        images: Any = transformers.CLIPImageProcessor(size=size, crop_size=crop)
        return transformers.LlavaProcessor(image_processor=images, **options)
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    images = transformers.LlavaNextImageProcessor(size=size, crop_size=crop, image_grid_pinpoints=pinpoints)
    return transformers.LlavaNextProcessor(image_processor=images, **options)


def make_image(seed: int, height: int = 40, width: int = 50) -> np.ndarray:
    """uint8 [height, width, 3]: smooth, so that resizing keeps something of it."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 10
    waves = [np.sin(random.normal() * x + random.normal() * y + random.normal()) for _ in range(3)]
    return (127.5 * (1 + np.stack(waves, axis=-1))).astype(np.uint8)


def write_model(folder: Path, model_type: str, family: str) -> tuple[Any, Any]:
    """Saves a model and its processor as transformers does, and returns both."""
    model, processor = make_model(model_type, family), make_processor(model_type)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def captured(model: Any, inputs: Any) -> tuple[np.ndarray, np.ndarray]:
    """(logits, what the language model's first block reads), float32 [b, t, v] and [b, t, d]."""
    found: list[np.ndarray] = []

    def see(module: Any, arguments: Any, options: Any) -> None:
        x = arguments[0] if arguments else options["hidden_states"]
        found.append(x.detach().numpy().copy())

    hook = model.model.language_model.layers[0].register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        logits = model(**inputs).logits.numpy()
    hook.remove()
    return logits, found[0]
