"""Writes calibration embeddings of images and prompts, as the text model of a vision-language model reads them.

    python scripts/make_image_calibration.py MODEL --images FOLDER --prompts prompts.jsonl --out calibration.npz
    cluscomp compress MODEL --calibration calibration.npz --out OUT

Each line of the prompts is {"image": "name in FOLDER", "prompt": "text"}. A prompt without the image's token is put
into the processor's chat template as a user's message with the image; without a template the token comes first. A
prompt with the token is taken as it is, an answer after it too. Needs `pip install ".[hf,parity]" pillow`.

The processor, vision tower and projector are transformers' own, loaded from MODEL; the decoder's blocks are not loaded.
What is written is the input of the first one: float16 or float32 [samples, t, d], the mask of valid positions, and the
tokens, -1 at positions of images.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import transformers
from PIL import Image, UnidentifiedImageError

from cluscomp_jax.errors import InputError
from cluscomp_jax.models.calibration import NO_TOKEN


class Example(NamedTuple):
    """An image and the text around it, and the line that they come from."""

    image: Path
    prompt: str
    where: str


class _Seen(Exception):
    """Ends a forward pass once the input of the language model is known."""


def read_examples(prompts: Path, images: Path) -> list[Example]:
    """Returns the examples of a JSONL file, whose images are in a folder.

    Raises:
      InputError: the file cannot be read, is empty, or a line is not an image and a prompt; the line is named.
    """
    try:
        lines = prompts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{prompts}: cannot be read: {error}") from None
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{prompts}: line {number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where} is no JSON: {error}") from None
        if not isinstance(fields, dict) or not all(isinstance(fields.get(name), str) for name in ("image", "prompt")):
            raise InputError(f'{where} must be {{"image": "name", "prompt": "text"}}; it is {line[:80]}')
        examples.append(Example(images / fields["image"], fields["prompt"], where))
    if not examples:
        raise InputError(f"{prompts} has no line; give at least one image and prompt")
    return examples


def read_image(example: Example) -> Any:
    """Returns an image in RGB.

    Raises:
      InputError: it cannot be read; the line that names it is named.
    """
    try:
        with Image.open(example.image) as image:
            return image.convert("RGB")
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"{example.where}: {example.image} cannot be read as an image: {error}") from None


def text_of(prompt: str, processor: Any) -> str:
    """Returns what the processor tokenises: the prompt with the image's token."""
    if processor.image_token in prompt:
        return prompt
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        return str(processor.apply_chat_template(messages, add_generation_prompt=True))
    return f"{processor.image_token} {prompt}"


def load(model: str) -> tuple[Any, Any]:
    """Returns (model, processor) of transformers, the model without blocks: tower, projector and embedding alone.

    Raises:
      InputError: transformers cannot load them.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(model)
        config.text_config.num_hidden_layers = 0
        if getattr(config.text_config, "layer_types", None):
            config.text_config.layer_types = []
        loaded = transformers.AutoModelForImageTextToText.from_pretrained(model, config=config, dtype=torch.float32)
        processor = transformers.AutoProcessor.from_pretrained(model)
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise InputError(
            f"{model}: transformers loads no vision-language model: {str(error).splitlines()[0]}"
        ) from None
    if not hasattr(processor, "image_token"):
        raise InputError(f"{model}: its processor, {type(processor).__name__}, takes no images")
    return loaded.eval(), processor


def embed(model: Any, inputs: Any) -> np.ndarray:
    """Returns float32 [t, d], what the first block of the text model would read of one example."""
    found: list[torch.Tensor] = []

    def see(module: Any, arguments: Any, options: dict[str, Any]) -> NoReturn:
        found.append(options["inputs_embeds"])
        raise _Seen

    hook = model.model.language_model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**inputs)
    except _Seen:
        pass
    finally:
        hook.remove()
    return found[0][0].float().numpy()


def make_arrays(
    model: Any, processor: Any, examples: Sequence[Example], *, length: int | None
) -> dict[str, np.ndarray]:
    """Returns {"inputs": float32 [samples, t, d], "mask": bool [samples, t], "tokens": int32 [samples, t]}.

    Args:
      model: of `load`.
      processor: of `load`.
      examples: at least one.
      length: positions of a sample at most, the first ones; None: all.

    Raises:
      InputError: an image cannot be read.
    """
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    rows = []
    for example in examples:
        text = text_of(example.prompt, processor)
        inputs = processor(images=read_image(example), text=text, return_tensors="pt")
        tokens = inputs["input_ids"][0].numpy().astype(np.int32)
        rows.append((embed(model, inputs)[:length], np.where(tokens == image_token, NO_TOKEN, tokens)[:length]))
    longest, width = max(len(tokens) for _, tokens in rows), rows[0][0].shape[1]
    arrays = {
        "inputs": np.zeros((len(rows), longest, width), np.float32),
        "mask": np.zeros((len(rows), longest), np.bool_),
        "tokens": np.full((len(rows), longest), NO_TOKEN, np.int32),
    }
    for i, (x, tokens) in enumerate(rows):
        arrays["inputs"][i, : len(x)], arrays["tokens"][i, : len(x)], arrays["mask"][i, : len(x)] = x, tokens, True
    return arrays


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the file and says what is in it; 2 where the input is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder or hub id of a vision-language model")
    parser.add_argument("--images", type=Path, required=True, help="folder of the images")
    parser.add_argument("--prompts", type=Path, required=True, help='JSON lines of {"image", "prompt"}')
    parser.add_argument("--out", type=Path, required=True, help="file to write, .npz")
    parser.add_argument("--length", type=int, help="positions of a sample at most (default: all)")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the embeddings")
    arguments = parser.parse_args(argv)
    try:
        if arguments.out.suffix != ".npz":
            raise InputError(f"{arguments.out}: the file must be called .npz")
        if arguments.length is not None and arguments.length < 2:
            raise InputError(f"--length {arguments.length}: it must be 2 or more")
        examples = read_examples(arguments.prompts, arguments.images)
        for example in examples:  # before the model is loaded
            read_image(example)
        arrays = make_arrays(*load(arguments.model), examples, length=arguments.length)
        inputs = arrays["inputs"].astype(arguments.dtype)
        if not np.isfinite(inputs).all():
            raise InputError(f"--dtype {arguments.dtype} does not hold the embeddings; take float32")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    np.savez(arguments.out, inputs=inputs, mask=arrays["mask"], tokens=arrays["tokens"])
    images = int((arrays["mask"] & (arrays["tokens"] == NO_TOKEN)).sum())
    print(f"{arguments.out}: {len(examples)} samples, {arrays['mask'].sum()} positions, {images} of them of images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
