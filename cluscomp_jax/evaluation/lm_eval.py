"""The model class of EleutherAI's lm-evaluation-harness.

    python -m cluscomp_jax.evaluation.lm_eval --model cluscomp --model_args path=OUT --tasks TASK

takes the harness's own arguments; `path` is anything that `cluscomp evaluate` takes. The harness finds model classes
only in its own package, so that this module registers the class and then calls that package. Needs the extra `lm-eval`.
"""

import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from cluscomp_jax.errors import InputError
from cluscomp_jax.evaluation.loglikelihood import Continuation, Score, score_continuations
from cluscomp_jax.inference.completion import complete
from cluscomp_jax.inference.decoder import Decoder
from cluscomp_jax.inference.sampling import Sampling
from cluscomp_jax.io.open import open_model
from cluscomp_jax.io.tokenizer import stop_tokens
from cluscomp_jax.runtime.extras import needed_for
from cluscomp_jax.runtime.host_memory import keep_freed_memory, schedule_for_memory

with needed_for("the evaluation harness", "lm-eval", command=__name__ == "__main__"):
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm

_DEFAULT_NEW_TOKENS = 256
_MODEL_ARGS = ("path", "max_length", "dtype", "decode_weights", "cache")


def _whole(name: str, value: int | str, *, least: int) -> int:
    try:
        number = int(value)
    except ValueError:
        raise InputError(f"{name} is {value!r}; it must be a whole number") from None
    if number < least:
        raise InputError(f"{name} is {number}; it must be {least} or more")
    return number


@register_model("cluscomp")
class CluscompLM(TemplateLM):  # type: ignore[misc]
    """Log-likelihoods, rolling log-likelihoods and generation of any model that can be opened."""

    def __init__(
        self,
        path: str | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "float32",
        decode_weights: str = "once",
        cache: str | None = None,
        **unknown: Any,
    ):
        """Opens and loads a model.

        Args:
          path: compressed folder, Hugging Face folder or hub id, or .gguf file; must be given.
          batch_size: requests per forward pass, 1 or more; "auto" is 8.
          max_length: most tokens that pass through the model, at most its context; None: that.
          max_batch_size: handed over by the harness and not used.
          device: the same; JAX chooses the device.
          dtype: compute dtype.
          decode_weights: as for `cluscomp_jax.generate`.
          cache: `cache_dtype` of `cluscomp_jax.generate`.
          **unknown: refused.

        Raises:
          InputError: no such model, or an argument unknown or out of its range.
        """
        super().__init__()
        if path is None:
            raise InputError("no model is named; give --model_args path=OUT")
        if unknown:
            raise InputError(f"model_args has no {', '.join(unknown)}; there are {', '.join(_MODEL_ARGS)}")
        self.batch_size = 8 if batch_size == "auto" else _whole("batch_size", batch_size, least=1)
        opened = open_model(path)
        self.tokenizer = opened.load_tokenizer()
        self._name = opened.name
        context = getattr(opened.config, "max_position_embeddings", None)
        self.max_length = _whole("max_length", (context or 2048) if max_length is None else max_length, least=2)
        if context is not None and self.max_length > context:
            raise InputError(f"max_length {self.max_length} exceeds the model's context of {context}; lower it")
        self._decoder = Decoder.load(
            opened.source,
            opened.model,
            dtype=dtype,
            decode_weights=decode_weights,  # type: ignore[arg-type]
            cache_dtype=cache,  # type: ignore[arg-type]
        )
        self._stop_tokens = stop_tokens(opened.config, self.tokenizer)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that precedes a text without a context."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        """The name under which requests are cached."""
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        """Returns the tokens of a text, with the tokenizer's own special tokens unless the arguments say otherwise.

        A text that already begins with the start token gets no second one.
        """
        start = self.tokenizer.bos_token
        options: dict[str, Any] = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and start is not None and string.startswith(start):
            options = {"add_special_tokens": False}
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the messages as one text in the model's chat template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_options: Any
    ) -> list[tuple[float, bool]]:
        scores = self._score([Continuation(c, t) for _, c, t in requests], "loglikelihood", disable_tqdm)
        for (pair, _, _), score in zip(requests, scores, strict=True):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, tuple(score))
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each whole text, in windows of as much context as fits."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            (text,) = request.args
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, tokens in map(make_disjoint_window, cut):
                windows.append(Continuation(context, tokens))
                owners.append(i)
        totals = np.zeros(len(requests))
        np.add.at(totals, owners, [s.log_likelihood for s in self._score(windows, "rolling", disable_tqdm)])
        for request, total in zip(requests, totals.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return [float(total) for total in totals]

    def _score(self, requests: Sequence[Continuation], title: str, quiet: bool) -> list[Score]:
        with tqdm(total=len(requests), desc=f"cluscomp {title}", disable=quiet) as bar:
            return score_continuations(
                self._decoder, requests, batch_size=self.batch_size, max_length=self.max_length, advance=bar.update
            )

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Returns what follows each context, up to its stop strings; requests of equal settings share batches."""
        found: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        with tqdm(total=len(requests), desc="cluscomp generate", disable=disable_tqdm) as bar:
            for members in groups.values():
                members.sort(key=lambda i: -len(requests[i].args[0]))
                for begin in range(0, len(members), self.batch_size):
                    chosen = members[begin : begin + self.batch_size]
                    contexts = [requests[i].args[0] for i in chosen]
                    texts = self._generate(contexts, dict(requests[chosen[0]].args[1]))
                    for i, text in zip(chosen, texts, strict=True):
                        found[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(chosen))
        return found

    def _generate(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        options = normalize_gen_kwargs(settings, _DEFAULT_NEW_TOKENS)
        stops = handle_stop_sequences(options.get("until"), eos=None)
        new = int(options["max_gen_toks"])
        room = self.max_length - new
        if room < 1:
            raise InputError(f"{new} new tokens leave no room for a prompt in {self.max_length}; lower max_gen_toks")
        sampling = Sampling(
            temperature=float(options.get("temperature") or 0.0),
            top_k=options.get("top_k") or None,
            top_p=options.get("top_p"),
            min_p=options.get("min_p"),
            repetition_penalty=float(options.get("repetition_penalty", 1.0)),
        )
        prompts = [np.asarray(self.tok_encode(context)[-room:], np.int32) for context in contexts]
        completions, _ = complete(
            self._decoder,
            self.tokenizer,
            prompts,
            max_new_tokens=new,
            sampling=sampling,
            key=jax.random.key(int(options.get("seed", 0))),
            stop_tokens=self._stop_tokens,
            stop_strings=[stop for stop in stops if stop],
        )
        return [completion.text for completion in completions]


def main() -> int:
    """Runs the harness's command line with the model `cluscomp` registered, and returns 0, or 2 for wrong input."""
    with needed_for("the evaluation harness", "lm-eval"):
        from lm_eval.__main__ import cli_evaluate

    keep_freed_memory()
    schedule_for_memory()
    try:
        cli_evaluate()
    except InputError as error:
        print(f"cluscomp_jax.evaluation.lm_eval: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
