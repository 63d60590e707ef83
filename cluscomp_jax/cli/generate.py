"""`cluscomp generate`: continues prompts with any model that can be opened."""

import dataclasses
import sys
from typing import Any

import jax
import numpy as np

from cluscomp_jax.cli.arguments import GenerateArguments
from cluscomp_jax.cli.outcome import Result, note
from cluscomp_jax.errors import InputError
from cluscomp_jax.inference.completion import Completion, Rates, complete
from cluscomp_jax.inference.decoder import Decoder, checked_prompts
from cluscomp_jax.inference.sampling import Sampling
from cluscomp_jax.io.open import open_model
from cluscomp_jax.io.tokenizer import encode_text, stop_tokens
from cluscomp_jax.text.json_lines import apply_chat_template


def run(arguments: GenerateArguments) -> Result:
    """Returns the continuations of the prompts; with --stream they are printed as they come."""
    sampling = Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
    )
    _refuse(arguments)
    opened = open_model(arguments.model)
    tokenizer = opened.load_tokenizer()
    prompts = [
        encode_prompt(tokenizer, text, chat=arguments.chat, system=arguments.system) for text in arguments.prompt
    ]
    checked_prompts(prompts, opened.model, arguments.max_new_tokens)
    decoder = Decoder.load(
        opened.source,
        opened.model,
        dtype=arguments.dtype,
        decode_weights=arguments.decode_weights,
        cache_dtype=arguments.cache,
    )
    if arguments.stream and not arguments.chat:
        _show(0, arguments.prompt[0])
    completions, rates = complete(
        decoder,
        tokenizer,
        prompts,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        key=jax.random.key(arguments.seed or 0),
        stop_tokens=stop_tokens(opened.config, tokenizer),
        stop_strings=arguments.stop,
        on_text=_show if arguments.stream else None,
    )
    if arguments.stream:
        _show(0, "\n")
    note(_describe(rates))
    fields = _fields(arguments, prompts, completions, rates)
    return Result("" if arguments.stream else _text(arguments, completions), {**fields, "model": opened.name})


def _refuse(arguments: GenerateArguments) -> None:
    if arguments.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {arguments.max_new_tokens}: it must be 1 or more")
    if arguments.seed is not None and arguments.temperature == 0:
        raise InputError(f"--seed {arguments.seed} has no effect at --temperature 0; leave it out")
    if arguments.seed is not None and not 0 <= arguments.seed < 2**32:
        raise InputError(f"--seed {arguments.seed}: it must be from 0 to 2**32-1")
    if not arguments.prompt:
        raise InputError("--prompt is empty; give at least one")
    if arguments.stream and len(arguments.prompt) > 1:
        raise InputError(f"--stream shows one completion as it comes, not {len(arguments.prompt)}; leave it out")
    if arguments.temperature == 0:
        for name in ("top_k", "top_p", "min_p"):
            if (value := getattr(arguments, name)) is not None:
                raise InputError(
                    f"--{name.replace('_', '-')} {value} has no effect at --temperature 0, which takes the likeliest "
                    "token; give a temperature above 0, or leave it out"
                )
    if arguments.system is not None and not arguments.chat:
        raise InputError("--system has no effect without --chat; add that, or leave it out")


def _show(_row: int, text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _describe(rates: Rates) -> str:
    return (
        f"prefill {rates.prefill_tokens} tokens, {rates.prefill_rate:,.1f} tokens/s; decode {rates.decode_tokens} "
        f"tokens, {rates.decode_rate:,.1f} tokens/s; {rates.compile_seconds:.1f} s of compilation in neither"
    )


def _text(arguments: GenerateArguments, completions: list[Completion]) -> str:
    """Returns what a person reads: each prompt with its continuation, or the answers of a chat."""
    shown = [
        completion.text if arguments.chat else prompt + completion.text
        for prompt, completion in zip(arguments.prompt, completions, strict=True)
    ]
    return "\n---\n".join(shown)


def _fields(
    arguments: GenerateArguments, prompts: list[np.ndarray], completions: list[Completion], rates: Rates
) -> dict[str, Any]:
    """Returns the JSON form; the fields of a single prompt are at the top as well."""
    rows = [
        {
            "prompt": text,
            "completion": completion.text,
            "prompt_tokens": len(prompt),
            "new_tokens": len(completion.tokens),
            "stop": completion.stop,
        }
        for text, prompt, completion in zip(arguments.prompt, prompts, completions, strict=True)
    ]
    measured = {
        **dataclasses.asdict(rates),
        "prefill_tokens_per_second": rates.prefill_rate,
        "decode_tokens_per_second": rates.decode_rate,
    }
    return {**(rows[0] if len(rows) == 1 else {}), "completions": rows, **measured}


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool, system: str | None = None) -> np.ndarray:
    """Returns int32 [t] tokens of a prompt, as plain text or as a user's message in the chat template.

    Args:
      tokenizer: of transformers.
      prompt: the text.
      chat: whether it becomes a message.
      system: a system message before it.

    Raises:
      InputError: an empty prompt, or a chat template that is missing or refuses it.
    """
    if not chat:
        tokens = encode_text(tokenizer, prompt)
    elif not getattr(tokenizer, "chat_template", None):
        raise InputError("--chat: the model's tokenizer has no chat template; leave --chat out")
    else:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": prompt})
        text = apply_chat_template("--chat", tokenizer, messages, prompt=True)
        tokens = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    if not len(tokens):
        raise InputError("--prompt is empty; give at least one word")
    return tokens
