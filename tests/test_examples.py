"""Every example runs as it is written, and what it computes and writes is right."""

import runpy
from pathlib import Path

import pytest
from paths import ROOT

from cluscomp_jax.cli import main

EXAMPLES = ROOT / "examples"


def test_every_example_has_a_test_here() -> None:
    tested = {"compress_tiny_llama.py", "diffusion_unet.py"}  # the second in test_diffusion_example.py
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix == ".py"} == tested


@pytest.mark.long
def test_compress_tiny_llama(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(checkout.rglob("*"))
    names = runpy.run_path(str(EXAMPLES / "compress_tiny_llama.py"))
    printed = capsys.readouterr().out
    assert names["original"].perplexity == pytest.approx(73.53, abs=0.05)
    assert names["original"].tokens == names["result"].tokens == 32 * 255
    assert names["result"].perplexity == pytest.approx(73.88, rel=0.03)  # last bits of the codes depend on the machine
    assert names["reloaded"].perplexity == names["result"].perplexity
    assert 0.99 * 2.6 <= names["report"].bits_per_weight <= 2.6
    assert len(names["report"].matrices) == 5 * 7
    assert names["new_tokens"].shape == (16,)
    for line in (" bits per weight in 35 matrices", "perplexity of 8,160 tokens: 73.5", names["completion"]):
        assert line in printed
    tops = {path.relative_to(checkout).parts[0] for path in set(checkout.rglob("*")) - before}
    assert tops == {"tiny-llama-2.6-bits"}

    assert main(["inspect", "tiny-llama-2.6-bits", "--verify"]) == 0
    inspected = capsys.readouterr().out
    assert f"perplexity: {names['original'].perplexity:.4f} original" in inspected
    assert f"perplexity: {names['result'].perplexity:.4f} compressed" in inspected
    assert (
        main(["generate", "tiny-llama-2.6-bits", "--prompt", "The capital of France is", "--max-new-tokens", "16"]) == 0
    )
    assert f"The capital of France is{names['completion']}" in capsys.readouterr().out
