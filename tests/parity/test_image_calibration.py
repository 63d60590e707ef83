"""scripts/make_image_calibration.py: what it writes is what transformers' text model reads, and compress takes it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from script_modules import load_script

from cluscomp_jax.cli import main
from cluscomp_jax.models.calibration import read_embeddings

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch_vlms  # noqa: E402  it imports both
from PIL import Image  # noqa: E402

script: Any = load_script("make_image_calibration")
PROMPTS = ("what is it", "<image> a wave, or not", "look at <image>: is it green and blue, or red")


def write_examples(folder: Path) -> list[str]:
    """Three images of their own sizes and their prompts; returns the options that name them."""
    (folder / "images").mkdir()
    lines = []
    for i, prompt in enumerate(PROMPTS):
        Image.fromarray(torch_vlms.make_image(i, 40 + 10 * i, 60 - 5 * i)).save(folder / f"images/{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "prompt": prompt}))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n\n")
    return ["--images", str(folder / "images"), "--prompts", str(folder / "prompts.jsonl")]


@pytest.mark.parametrize("model_type", ["llava", "llava_next"])
def test_the_embeddings_are_what_the_first_block_reads(
    tmp_path: Path, model_type: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = torch_vlms.write_model(tmp_path / "vlm", model_type, "qwen2")
    options = write_examples(tmp_path)
    out = tmp_path / "calibration.npz"
    assert script.main([str(tmp_path / "vlm"), *options, "--out", str(out)]) == 0
    found = read_embeddings(out)
    assert found.mask is not None
    assert found.tokens is not None
    for i, prompt in enumerate(PROMPTS):
        text = prompt if "<image>" in prompt else f"<image> {prompt}"
        image = Image.open(tmp_path / f"images/{i}.png")
        inputs = processor(images=image, text=text, return_tensors="pt")
        _, x = torch_vlms.captured(model, inputs)
        assert found.mask[i].sum() == x.shape[1]
        np.testing.assert_array_equal(found.inputs[i, found.mask[i]], x[0])
        ids = inputs["input_ids"][0].numpy()
        of_image = ids == torch_vlms.VOCABULARY.index("<image>")
        assert of_image.sum() >= 4
        np.testing.assert_array_equal(found.tokens[i, found.mask[i]], np.where(of_image, -1, ids))
    images = int((found.mask & (found.tokens < 0)).sum())
    assert f"3 samples, {found.mask.sum()} positions, {images} of them of images" in capsys.readouterr().out

    (tmp_path / "run.toml").write_text("[tuning]\nvalidation_samples = 1\nbatch_size = 1\nepochs = 1\n")
    command = ["compress", str(tmp_path / "vlm"), "--calibration", str(out), "--out", str(tmp_path / "small")]
    assert main([*command, "--bits", "4", "--config", str(tmp_path / "run.toml")]) == 0
    assert main(["export", str(tmp_path / "small"), "--format", "dense", "--out", str(tmp_path / "dense")]) == 0
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(str(tmp_path / "dense"), dtype=torch.float32)
    assert np.isfinite(torch_vlms.captured(loaded.eval(), inputs)[0]).all()


def test_a_chat_template_is_used_where_there_is_one(tmp_path: Path) -> None:
    processor = torch_vlms.make_processor("llava")
    processor.chat_template = "user: {% for part in messages[0].content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}. answer: "  # noqa: E501
    assert script.text_of("what is it", processor) == "user: <image>what is it. answer: "


def test_samples_are_cut_and_cast_as_asked(tmp_path: Path) -> None:
    torch_vlms.write_model(tmp_path / "vlm", "llava", "llama")
    options = [*write_examples(tmp_path), "--length", "9", "--dtype", "float16"]
    assert script.main([str(tmp_path / "vlm"), *options, "--out", str(tmp_path / "e.npz")]) == 0
    found = read_embeddings(tmp_path / "e.npz")
    assert found.shape == (3, 9)
    assert found.inputs.dtype == np.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("unreadable image", "prompts.jsonl: line 2: {images}/1.png cannot be read as an image"),
        ("cut image", "prompts.jsonl: line 2: {images}/1.png cannot be read as an image"),
        ("missing image", "prompts.jsonl: line 2: {images}/1.png cannot be read as an image"),
        ("no json", "prompts.jsonl: line 1 is no JSON"),
        (
            "no prompt",
            'prompts.jsonl: line 1 must be {{"image": "name", "prompt": "text"}}; it is {{"image": "0.png"}}',
        ),
        ("empty", "prompts.jsonl has no line"),
        ("no file", "prompts.jsonl: cannot be read"),
        ("no model", "nowhere: transformers loads no vision-language model"),
        ("other name", "e.txt: the file must be called .npz"),
        ("length", "--length 1: it must be 2 or more"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = write_examples(tmp_path)
    images, prompts = tmp_path / "images", tmp_path / "prompts.jsonl"
    out = "e.txt" if change == "other name" else "e.npz"
    if change == "unreadable image":
        (images / "1.png").write_text("no image")
    if change == "cut image":
        (images / "1.png").write_bytes((images / "1.png").read_bytes()[:200])
    if change == "missing image":
        (images / "1.png").unlink()
    if change in ("no json", "no prompt", "empty"):
        prompts.write_text({"no json": "words", "no prompt": '{"image": "0.png"}', "empty": "\n"}[change])
    if change == "no file":
        prompts.unlink()
    options += ["--length", "1"] if change == "length" else []
    assert script.main([str(tmp_path / "nowhere"), *options, "--out", str(tmp_path / out)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message.format(images=images) in lines[0]
    assert not (tmp_path / out).exists()
