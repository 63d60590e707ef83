"""OPT on the command line, of both placements of norms: compressed and tuned, evaluated, finetuned, exported."""

import json
from pathlib import Path

import numpy as np
import pytest
from cli_models import CHARACTERS, write_text, write_tokenizer
from family_cases import fields_of, random_params
from io_models import write_hf

from cluscomp_jax import load_checkpoint, open_model
from cluscomp_jax.cli import main
from cluscomp_jax.core import trees
from cluscomp_jax.models.decoder import forward
from cluscomp_jax.models.model import parse_model_config
from cluscomp_jax.models.source import load_all
from cluscomp_jax.models.tensor_names import names_of, to_flax

pytestmark = pytest.mark.long
POSITIONS = 24


def write_opt(folder: Path, name: str) -> Path:
    """A random OPT of 24 positions with a tokenizer of single characters."""
    fields = fields_of(name) | {"num_hidden_layers": 2, "max_position_embeddings": POSITIONS}
    assert len(CHARACTERS) + 2 <= fields["vocab_size"]
    config = parse_model_config(fields)
    names = names_of(config, "hugging_face")
    flat = trees.flatten(random_params(config))
    write_hf(folder, fields, {names.name(path): to_flax(path, leaf) for path, leaf in flat.items()})
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("name", ["opt", "opt_post_norm"])
def test_from_a_folder_to_a_dense_export(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = write_opt(tmp_path / "model", name), write_text(tmp_path / "text.txt", 400)

    def run(*argv: str) -> dict[str, float]:
        assert main([*argv, "--json"]) == 0, capsys.readouterr().err
        fields: dict[str, float] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return fields

    samples = ["--calibration", str(text), "--samples", "4", "--length", str(POSITIONS), "--epochs", "1"]
    codes = ["--g", "4", "--num-codes", "64"]
    run("compress", str(model), "--out", str(tmp_path / "small"), *samples, *codes)
    window = ["--text", str(text), "--context", str(POSITIONS)]
    before = run("evaluate", str(tmp_path / "small"), *window)["perplexity"]
    training = ["--data", str(text), "--length", str(POSITIONS), "--steps", "30", "--out", str(tmp_path / "tuned")]
    run("finetune", str(tmp_path / "small"), *training)
    assert run("evaluate", str(tmp_path / "tuned"), *window)["perplexity"] < before
    run("export", str(tmp_path / "small"), "--format", "dense", "--out", str(tmp_path / "dense"), "--dtype", "float32")
    params, config = load_checkpoint(tmp_path / "small")
    again = open_model(tmp_path / "dense")
    assert again.config == config
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, POSITIONS))
    expected = np.asarray(forward(params, tokens, config))
    found = np.asarray(forward(load_all(again.source, again.model), tokens, config))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        (["evaluate", "{}", "--text", "{}/../text.txt", "--context", "25"], "--context: 25 positions"),
        (["compress", "{}", "--out", "{}/o", "--calibration", "{}/../text.txt", "--length", "25"], "--length: 25 posi"),
        (["compress", "{}", "--out", "{}/o", "--evaluate", "{}/../text.txt", "--context", "25"], "--context: 25 posit"),
        (["generate", "{}", "--prompt", "a", "--max-new-tokens", "24"], "exceed the model's context of 24"),
    ],
)
def test_what_is_longer_than_the_table_is_refused_in_one_line(
    argv: list[str], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path / "text.txt", 200)
    model = write_opt(tmp_path / "model", "opt")
    assert main([part.format(model) for part in argv]) == 2
    err = capsys.readouterr().err.splitlines()
    assert what in err[-1]
    assert not (model / "o").exists()
