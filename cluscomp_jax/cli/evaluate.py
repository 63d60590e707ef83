"""`cluscomp evaluate`: the perplexity of a text under any model that can be opened."""

import dataclasses

from cluscomp_jax.cli.arguments import EvaluateArguments
from cluscomp_jax.cli.inputs import read_tokens, require_windows
from cluscomp_jax.cli.outcome import Result
from cluscomp_jax.errors import InputError
from cluscomp_jax.evaluate import Perplexity, perplexity
from cluscomp_jax.io.open import open_model
from cluscomp_jax.progress import console_reporter


def run(arguments: EvaluateArguments) -> Result:
    """Returns the perplexity and what it was measured on."""
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size {arguments.batch_size}: it must be 1 or more")
    if arguments.tokens is not None and arguments.tokens < arguments.context:
        raise InputError(f"--tokens {arguments.tokens} do not fill one window of --context {arguments.context}")
    opened = open_model(arguments.model)
    tokens = read_tokens(opened, arguments.text, first=arguments.tokens)
    require_windows(arguments.text, tokens, arguments.context)
    with console_reporter() as reporter:
        measured = perplexity(
            opened.source,
            tokens,
            opened.model,
            context=arguments.context,
            batch_size=arguments.batch_size,
            dtype=arguments.dtype,
            reporter=reporter,
        )
    return Result(describe(measured), {**dataclasses.asdict(measured), "model": opened.name, "text": arguments.text})


def describe(measured: Perplexity) -> str:
    """Returns one line for a person."""
    rate = measured.windows * measured.context / max(measured.seconds, 1e-9)
    return (
        f"perplexity {measured.perplexity:.4f} ({measured.tokens:,} tokens scored in {measured.windows} windows of "
        f"{measured.context}; {measured.seconds:.1f} s, {rate:,.0f} tokens/s)"
    )
