"""The harness's model class beside its own PyTorch backend on the small Llama: log-likelihoods, rolling, generation."""

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

    from cluscomp_jax.lm_eval import CluscompLM

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
