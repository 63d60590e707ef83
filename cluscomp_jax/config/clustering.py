"""Which matrices are compressed, and how they become codebooks."""

import dataclasses
import math
import re
from typing import Literal

from cluscomp_jax.config.checks import require, require_finite
from cluscomp_jax.core.coding import MAX_CODES, MAX_GROUP, PLAIN, Axis, Coding, Form, TrellisCoding
from cluscomp_jax.core.host_axes import check_axes
from cluscomp_jax.errors import InputError

BudgetCoding = Literal["auto", "plain", "trellis"]
TieCodebooks = Literal["none", "input", "block"]
DECODER_KERNELS = r"model/layers/\d+/(self_attn/[qkvo]_proj|mlp/(experts/\d+/)?(gate|up|down)_proj)/kernel"
"""The seven projections of every decoder block; embeddings, norms and lm_head stay in 16 bit (paper section 4)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionRule:
    """Matrices whose whole path matches `pattern` are cut into vectors of `group_size` weights along `axis`.

    Attributes:
      pattern: regular expression, matched against the whole path.
      group_size: weights per code, g of the paper, 1 to 32.
      num_codes: codes per codebook, 2 to 65536.
      axis: the axis of the kernel [d_in, d_out] that is cut.
      step_bits: bits of the index that a code takes: codes are overlapping windows of a stream of bits, of log2
        num_codes bits each, 1 to log2 num_codes (a trellis; num_codes is a power of two). None: every code has an
        entry of its own in the index, of ceil(log2 num_codes) bits.
      axes: for `cluster_tree` and `compress_blocks`: "names -> stacked | inputs | outputs" of the axes of the host's
        array, for example "l d n h -> l | d | n h". None: [d_in, d_out].
    """

    pattern: str = DECODER_KERNELS
    group_size: int = 4
    num_codes: int = 65500
    axis: Axis = "out"
    step_bits: int | None = None
    axes: str | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise InputError(f"rule pattern {self.pattern!r} is not a regular expression: {error}") from error
        require(1 <= self.group_size <= MAX_GROUP, "group_size", self.group_size, f"1 to {MAX_GROUP}")
        require(2 <= self.num_codes <= MAX_CODES, "num_codes", self.num_codes, f"2 to {MAX_CODES}")
        require(self.axis in ("out", "in"), "axis", self.axis, "'out' or 'in'")
        if self.step_bits is not None:
            n, window = self.num_codes, self.num_codes.bit_length() - 1
            require(n == 1 << window, "num_codes", n, "a power of two where step_bits is given")
            require(1 <= self.step_bits <= window, "step_bits", self.step_bits, f"1 to {window} for {n} codes")
        if self.axes is not None:
            check_axes(self.axes)

    @property
    def coding(self) -> Coding:
        """How the index names the codes."""
        return PLAIN if self.step_bits is None else TrellisCoding(self.step_bits)

    def form(self, matrix_shape: tuple[int, int]) -> Form:
        """Returns what is static of a matrix of that shape and its codebook."""
        return Form(matrix_shape, self.num_codes, self.group_size, self.axis)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How matrices become codebooks.

    Attributes:
      rules: the first rule whose pattern matches decides; what no rule matches stays dense.
      bits: a budget in stored bits per weight instead of g and num_codes: every rule keeps its pattern and axis,
        and (g, num_codes) are chosen to meet the budget. None: the rules are used as they are.
      mixed_precision: how a budget is spent: "none": evenly; "per_matrix": by the measured sensitivity of the model's
        loss to each matrix, where calibration is given; every block may be compiled anew. "auto": per_matrix where
        `coding` offers trellises and blocks are not stacked, none elsewhere.
      coding: what a budget chooses: "trellis": trellis codes; "auto": for each matrix plain or trellis codes, whichever
        has less error; both spend a budget to the end, some matrices getting the next setting; "plain": plain codes,
        of one (group_size, num_codes) for all unless precision is mixed. Tied codebooks and AQLM have plain codes only:
        with them "auto" is "plain". Without a budget "auto" and "plain" change nothing.
      tie_codebooks: which projections of a block have one codebook: "none"; "input": those that read one input (q, k
        and v; gate and up); "block": all; as far as their rules give them one (g, num_codes, axis). Worth its while
        where codebooks are large compared with their matrices (docs/experiments.md).
      export: the form the result is meant for: "aqlm" restricts a budget, and refuses rules, to what an AQLM
        checkpoint can hold: one (g, num_codes) and axis for all matrices, g dividing every cut axis.
      iterations: Lloyd iterations, >= 0 (paper: 20).
      weighted: weight each vector by the mean square of its input channel, E[x_i^2], from calibration; used for
        axis "out" only, and only where calibration is given.
      weighted_outputs: weight the error of each output by the square root of its sensitivity, where bits are spent by
        sensitivities (`mixed_precision`); trellis codes only, as plain codes choose by vector.
      error_feedback: choose the codes of one input channel after another, each making good the errors before it, by
        the Hessian E[x x^T] from calibration; used for axis "out" only, and only where calibration is given.
      damping: share of the mean of E[x_i^2] added to the Hessian's diagonal, > 0.
      shrinkage: s of (1 - s) H + s diag H, the Hessian that error feedback uses, in [0, 1); before damping.
      drift_correction: before a kernel is clustered, move it towards what gives the original model's outputs from the
        compressed model's inputs (`cluscomp_jax.clustering.drift_correction`); with error feedback only.
      ridge: regularisation of the drift correction, as a share of the mean of E[x_i^2], > 0.
      true_sequential: inside a block, kernels see the outputs of those clustered before them, not of the original ones;
        with error feedback only.
      massive_activation_limit: a position whose output of the block has more than this many times the median mean
        square has proportionally less weight in the Hessian, >= 0; 0: all weigh the same; with error feedback only.
      refine_rounds: rounds in which every channel is assigned again, given all other errors, and the codebook is
        updated by least squares, >= 0; with error feedback only.
      codebook_dtype: 16-bit type codebooks are stored and evaluated in; a matrix with codes beyond the range of
        float16 is kept in bfloat16.
    """

    rules: tuple[CompressionRule, ...] = (CompressionRule(),)
    bits: float | None = None
    mixed_precision: Literal["auto", "none", "per_matrix"] = "auto"
    coding: BudgetCoding = "auto"
    tie_codebooks: TieCodebooks = "none"
    export: Literal["any", "aqlm"] = "any"
    iterations: int = 20
    weighted: bool = True
    weighted_outputs: bool = True
    error_feedback: bool = True
    damping: float = 0.01
    shrinkage: float = 0.2
    drift_correction: bool = True
    ridge: float = 1.0
    true_sequential: bool = True
    massive_activation_limit: float = 4.0
    refine_rounds: int = 3
    codebook_dtype: Literal["bfloat16", "float16"] = "float16"

    def __post_init__(self) -> None:
        require(len(self.rules) > 0, "rules", self.rules, "at least one rule")
        require(
            self.mixed_precision in ("auto", "none", "per_matrix"),
            "mixed_precision",
            self.mixed_precision,
            "'auto', 'none' or 'per_matrix'",
        )
        require(
            self.tie_codebooks in ("none", "input", "block"),
            "tie_codebooks",
            self.tie_codebooks,
            "'none', 'input' or 'block'",
        )
        require(self.coding in ("auto", "plain", "trellis"), "coding", self.coding, "'auto', 'plain' or 'trellis'")
        if self.coding == "trellis":
            wanted = "where coding is 'trellis'"
            require(self.bits is not None, "coding", self.coding, "'auto' without a budget; a rule has step_bits")
            require(self.tie_codebooks == "none", "tie_codebooks", self.tie_codebooks, f"'none' {wanted}")
            require(self.export == "any", "export", self.export, f"'any' {wanted}")
        if any(rule.step_bits is not None for rule in self.rules):
            wanted = "where a rule has step_bits"
            require(self.tie_codebooks == "none", "tie_codebooks", self.tie_codebooks, f"'none' {wanted}")
            require(self.export == "any", "export", self.export, f"'any' {wanted}")
        require(self.export in ("any", "aqlm"), "export", self.export, "'any' or 'aqlm'")
        if self.mixed_precision == "per_matrix":
            require(
                self.bits is not None,
                "mixed_precision",
                self.mixed_precision,
                "'none' without a budget to spend (bits)",
            )
            require(
                self.export == "any",
                "mixed_precision",
                self.mixed_precision,
                "'none' where export is 'aqlm', which has one setting",
            )
            require(
                self.tie_codebooks == "none",
                "mixed_precision",
                self.mixed_precision,
                f"'none' where tie_codebooks is {self.tie_codebooks!r}: kernels of one codebook have one setting",
            )
        require(self.iterations >= 0, "iterations", self.iterations, "0 or more")
        require(math.isfinite(self.damping) and self.damping > 0, "damping", self.damping, "above 0")
        require(0 <= self.shrinkage < 1, "shrinkage", self.shrinkage, "from 0 to below 1")
        require_finite("massive_activation_limit", self.massive_activation_limit, low=0.0)
        require(math.isfinite(self.ridge) and self.ridge > 0, "ridge", self.ridge, "above 0")
        require(self.refine_rounds >= 0, "refine_rounds", self.refine_rounds, "0 or more")
        require(
            self.codebook_dtype in ("bfloat16", "float16"),
            "codebook_dtype",
            self.codebook_dtype,
            "'bfloat16' or 'float16'",
        )
        if self.bits is not None:
            require(math.isfinite(self.bits) and self.bits > 0, "bits", self.bits, "a positive number")

    @property
    def calibrated(self) -> bool:
        """Whether clustering looks at the activations."""
        return self.weighted or self.error_feedback

    @property
    def plain(self) -> bool:
        """Whether a budget chooses plain codes only."""
        return self.coding == "plain" or self.tie_codebooks != "none" or self.export == "aqlm"

    @property
    def uneven(self) -> bool:
        """Whether a bit budget is spent by sensitivities, which calibration is needed for."""
        mixes = self.bits is not None and not self.plain and self.calibrated
        return mixes if self.mixed_precision == "auto" else self.mixed_precision == "per_matrix"

    @property
    def weighs_outputs(self) -> bool:
        """Whether errors of a trellis's outputs count by their sensitivities."""
        return self.weighted_outputs and self.uneven

    @property
    def weighs_positions(self) -> bool:
        """Whether a position counts by its output of the original block."""
        return self.error_feedback and self.massive_activation_limit > 0

    @property
    def corrects(self) -> bool:
        """Whether kernels are corrected for drifted inputs."""
        return self.error_feedback and self.drift_correction
