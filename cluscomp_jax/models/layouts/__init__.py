"""Layouts of other codebases, whose trees of parameters `compress` takes and gives back.

`auto` is all of them, the default of `compress`; `flax`, `hugging_face`, `tunix`, `bonsai`, `keras_hub` and `maxtext`
are those of one codebase. A `Layout` of your own is a table of names and axes.
"""

from cluscomp_jax.models.layouts.check import ApplyFn, check_forward
from cluscomp_jax.models.layouts.host_tree import HostTree
from cluscomp_jax.models.layouts.layout import Layout
from cluscomp_jax.models.layouts.recognise import Layouts, OpenedTree, open_tree
from cluscomp_jax.models.layouts.tables import auto, bonsai, flax, hugging_face, keras_hub, maxtext, tunix

__all__ = [
    "ApplyFn",
    "HostTree",
    "Layout",
    "Layouts",
    "OpenedTree",
    "auto",
    "bonsai",
    "check_forward",
    "flax",
    "hugging_face",
    "keras_hub",
    "maxtext",
    "open_tree",
    "tunix",
]
