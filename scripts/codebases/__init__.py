"""Codebases that know nothing of cluscomp_jax, each with a tiny random model, for scripts/try_codebases.py."""

from codebases.case import Case, Codebase
from codebases.flax_codebases import FLAX_CODEBASES
from codebases.other_codebases import OTHER_CODEBASES
from codebases.own_llamas import OWN_LLAMAS

CODEBASES = (*OWN_LLAMAS, *FLAX_CODEBASES, *OTHER_CODEBASES)

__all__ = ["CODEBASES", "Case", "Codebase"]
