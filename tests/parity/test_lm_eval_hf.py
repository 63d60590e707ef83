"""The harness's model class next to its PyTorch backend on the small Llama: log-likelihoods, rolling, generation."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
pytest.importorskip("torch")
pytest.importorskip("lm_eval")

PAIRS = [
    ("The city of", " London"),
    ("The city of", " the"),
    ("In the beginning of the century", " there was a war"),
    ("", "A text without a context"),
    ("A context that ends with a space ", "word"),
]


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def models(tiny_model: Path) -> tuple[Any, Any]:
    from lm_eval.models.huggingface import HFLM

    from cluscomp_jax.evaluation.lm_eval import CluscompLM

    ours = CluscompLM(path=str(tiny_model), batch_size=3)
    return ours, HFLM(pretrained=str(tiny_model), dtype="float32", batch_size=3, device="cpu")


def test_it_is_known_to_the_harness(models: tuple[Any, Any]) -> None:
    from lm_eval.api.registry import get_model

    assert get_model("cluscomp") is type(models[0])


def test_log_likelihoods_agree(models: tuple[Any, Any]) -> None:
    found, want = (model.loglikelihood(requests("loglikelihood", PAIRS)) for model in models)
    for ours, theirs in zip(found, want, strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-3)
        assert ours[1] == theirs[1]


def test_rolling_log_likelihoods_agree(models: tuple[Any, Any]) -> None:
    texts = [("A short text.",), ("A longer text of many words that goes on and on. " * 60,)]
    found, want = (model.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for model in models)
    assert found == pytest.approx(want, abs=1e-2, rel=1e-5)


def test_greedy_generation_agrees(models: tuple[Any, Any]) -> None:
    settings = {"until": [","], "max_gen_toks": 16, "do_sample": False}
    contexts = [("The city of", settings), ("In the beginning of the nineteenth century there", settings)]
    found, want = (model.generate_until(requests("generate_until", contexts)) for model in models)
    assert found == want


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({}, "path=OUT"),
    "no such model": ({"path": "nowhere"}, "'nowhere'"),
    "an argument of no one": ({"path": None, "colour": "red"}, "no colour.*max_length"),
    "a batch of a word": ({"path": None, "batch_size": "x"}, "batch_size is 'x'"),
    "no batch": ({"path": None, "batch_size": -2}, "batch_size is -2"),
    "a context of one": ({"path": None, "max_length": 1}, "max_length is 1"),
    "beyond the context": ({"path": None, "max_length": 257}, "257 exceeds the model's context of 256"),
    "dtype": ({"path": None, "dtype": "float5"}, "dtype is 'float5'"),
    "decode_weights": ({"path": None, "decode_weights": "never"}, "decode_weights is 'never'"),
    "cache": ({"path": None, "cache": "int4"}, "cache_dtype is 'int4'"),
}
"""Wrong arguments, a path of None standing for the small Llama's."""


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(tiny_model: Path, arguments: dict[str, Any], message: str) -> None:
    from cluscomp_jax.errors import InputError
    from cluscomp_jax.evaluation.lm_eval import CluscompLM

    given = {**arguments, **({"path": str(tiny_model)} if arguments.get("path", "") is None else {})}
    with pytest.raises(InputError, match=message):
        CluscompLM(**given)


def test_wrong_input_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from cluscomp_jax.evaluation import lm_eval as ours

    (tmp_path / "lines.jsonl").write_text('{"text": "a b", "last": " c"}\n')
    (tmp_path / "lines.yaml").write_text(
        f"task: lines\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/lines.jsonl}}}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{last}}'\n"
        "metric_list: [{metric: acc}]\n"
    )
    argv = ["--model", "cluscomp", "--model_args", "path=nowhere", "--tasks", "lines", "--include_path", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["lm_eval", *argv])
    assert ours.main() == 2
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("cluscomp_jax.evaluation.lm_eval: error: model 'nowhere'")
    )
