"""FinetuneConfig: everything a finetuning run depends on, and its strict TOML form."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from cluscomp_jax.config.data import DataConfig
from cluscomp_jax.config.mesh import MeshConfig
from cluscomp_jax.config.toml import overlay, read_toml
from cluscomp_jax.config.training import TrainingConfig
from cluscomp_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What `finetune` does.

    Attributes:
      model: the family's config (LlamaConfig); None only until a model has been opened.
      data: how texts become rows; of no effect where rows are handed in.
      training: what trains, and how.
      mesh: how the devices are arranged; data x fsdp divides the batch size.
      evaluate_every: steps between two evaluations, >= 1; there is one before the first step and one after the last
        in any case. None: only those.
      save_every: steps between two saved states, >= 1; a resumed run repeats at most this many.
      keep: saved states that are kept, >= 1.
      result: which masters become the result: "last", those after the last step; "best", those of the lowest
        evaluation, which every saved state then contains in addition.
      seed: non-negative; orders the rows.
    """

    model: Any = None
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()
    evaluate_every: int | None = None
    save_every: int = 100
    keep: int = 2
    result: Literal["last", "best"] = "last"
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("evaluate_every", "save_every", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be 1 or more")
        if self.result not in ("last", "best"):
            raise InputError(f"result is {self.result!r}; it must be 'last' or 'best'")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}; it must be from 0 to 2**32-1")
        parts = self.mesh.row_parts
        if self.training.batch_size % parts:
            raise InputError(
                f"batch_size is {self.training.batch_size}, mesh {self.mesh} spreads its rows over {parts} devices "
                f"(data x fsdp); choose a multiple of {parts}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings that make the run what it is as plain JSON values: all but the model and the mesh."""
        fields = dataclasses.asdict(dataclasses.replace(self, model=None))
        del fields["model"], fields["mesh"]
        return {"finetune": fields}


def load_finetune_config(path: str | Path) -> FinetuneConfig:
    """Returns the FinetuneConfig of a TOML file: tables [data] and [training], the other keys at the top.

    Raises:
      InputError: no such file, not TOML, a key nobody reads, or a value of the wrong type or range.
    """
    fields = read_toml(path)
    try:
        config = overlay(FinetuneConfig(), fields)
    except InputError as error:
        raise InputError(f"config {path}: {error}") from error
    assert isinstance(config, FinetuneConfig)
    return config
