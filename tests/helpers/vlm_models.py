"""Tiny vision-language models as folders: a text model of `io_models` inside, and tensors of every dtype around it.

Written byte by byte. Shares no code with the readers.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from cli_models import tensors, write_tokenizer
from io_models import config_fields

TRANSFORMERS_4 = {"": "language_model."}
TRANSFORMERS_5 = {"model.": "model.language_model.", "lm_head.": "lm_head."}
"""{beginning of a text model's name: what a vision-language model has in its place}, both forms in use."""


def around(prefix: str = "", seed: int = 0) -> dict[str, tuple[str, list[int], bytes]]:
    """{name: (dtype, shape, bytes)}: random bytes, so that floating ones hold NaNs too; one is a scalar."""
    random = np.random.default_rng(seed)
    sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "U8": 1}
    found = {
        f"{prefix}vision_tower.layers.{i}.weight": (dtype, [3, 5], random.bytes(15 * size))
        for i, (dtype, size) in enumerate(sizes.items())
    }
    found[f"{prefix}vision_tower.num_batches_tracked"] = ("I64", [], random.bytes(8))
    found[f"{prefix}multi_modal_projector.linear_1.weight"] = ("F32", [64, 3], random.bytes(64 * 3 * 4))
    found[f"{prefix}image_newline"] = ("F32", [64], random.bytes(64 * 4))
    return found


def nested_fields(model_type: str = "llava", text: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    fields = {
        "model_type": model_type,
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": 39,
        "text_config": config_fields() if text is None else text,
        "vision_config": {"model_type": "clip_vision_model"},
        "torch_dtype": "float32",
    }
    return fields | changes


def stored_name(name: str, prefixes: dict[str, str]) -> str:
    plain = next(plain for plain in prefixes if name.startswith(plain))
    return prefixes[plain] + name.removeprefix(plain)


def write_vlm(
    folder: Path, fields: dict[str, Any] | None = None, *, prefixes: dict[str, str] | None = None, **options: Any
) -> dict[str, tuple[str, list[int], bytes]]:
    """Writes a folder and returns what is around its text model."""
    prefixes = TRANSFORMERS_4 if prefixes is None else prefixes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(nested_fields() if fields is None else fields))
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    write_tokenizer(folder)
    outside = around("" if prefixes is TRANSFORMERS_4 else "model.")
    inside = {stored_name(name, prefixes): array for name, array in tensors(**options).items()}
    stored = {name: ("F32", list(array.shape), array.tobytes()) for name, array in inside.items()} | outside
    write_raw(folder / "model.safetensors", stored)
    return outside


def write_raw(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """Writes {name: (dtype, shape, bytes)} in the layout that safetensors documents."""
    header, end = dict[str, Any](), 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values()))


def read_raw(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """{name: (dtype, shape, bytes)} of a safetensors file, read by its documented layout alone."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    begin = 8 + length
    return {
        name: (fields["dtype"], fields["shape"], data[begin + fields["data_offsets"][0] :][: _length(fields)])
        for name, fields in header.items()
    }


def _length(fields: dict[str, Any]) -> int:
    first, last = fields["data_offsets"]
    return int(last - first)
