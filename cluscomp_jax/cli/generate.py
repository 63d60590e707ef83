"""`cluscomp generate`: continues a prompt with any model that can be opened."""

import time
from typing import Any

import jax
import numpy as np

from cluscomp_jax.cli.arguments import GenerateArguments
from cluscomp_jax.cli.outcome import Result
from cluscomp_jax.errors import InputError
from cluscomp_jax.generation import Sampling, generate
from cluscomp_jax.io.open import OpenedModel, open_model
from cluscomp_jax.io.tokenizer import encode_text


def run(arguments: GenerateArguments) -> Result:
    """Returns the continuation of the prompt."""
    Sampling(temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p)
    if arguments.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {arguments.max_new_tokens}: it must be 1 or more")
    if not 0 <= arguments.seed < 2**63:
        raise InputError(f"--seed {arguments.seed}: it must be from 0 to 2**63-1")
    opened = open_model(arguments.model)
    tokenizer = opened.load_tokenizer()
    prompt = encode_prompt(tokenizer, arguments.prompt, chat=arguments.chat)
    began = time.monotonic()
    tokens = generate(
        opened.source,
        prompt,
        opened.model,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        stop_tokens=stop_tokens(opened, tokenizer),
        key=jax.random.key(arguments.seed),
        dtype=arguments.dtype,
        materialize=arguments.materialize,
    )
    seconds = time.monotonic() - began
    completion = tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
    fields = {
        "prompt": arguments.prompt,
        "completion": completion,
        "prompt_tokens": len(prompt),
        "new_tokens": len(tokens),
        "seconds": seconds,
        "model": opened.name,
    }
    return Result(completion if arguments.chat else arguments.prompt + completion, fields)


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool) -> np.ndarray:
    """Returns int32 [t] tokens of a prompt, as plain text or as a user's message in the chat template.

    Raises:
      InputError: an empty prompt, or no chat template.
    """
    if not chat:
        tokens = encode_text(tokenizer, prompt)
    elif not getattr(tokenizer, "chat_template", None):
        raise InputError("--chat: the model's tokenizer has no chat template; leave --chat out")
    else:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        tokens = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    if not len(tokens):
        raise InputError("--prompt is empty; give at least one word")
    return tokens


def stop_tokens(opened: OpenedModel, tokenizer: Any) -> tuple[int, ...]:
    """Returns the tokens that end a text, by the model's config and by its tokenizer."""
    ends = {*getattr(opened.config, "eos_token_id", ()), tokenizer.eos_token_id}
    return tuple(sorted(token for token in ends if token is not None))
