"""What a run will need, before the run: its own programs compiled for a described card, and their memory."""

from cluscomp_jax.plan.presets import PRESETS, preset_config
from cluscomp_jax.plan.target import Target, compiling_for, find_target, placement
from cluscomp_jax.plan.whole import Plan, Reserve, plan

__all__ = ["PRESETS", "Plan", "Reserve", "Target", "compiling_for", "find_target", "placement", "plan", "preset_config"]
