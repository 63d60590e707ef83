"""How devices are arranged."""

import dataclasses
import math

from cluscomp_jax.config.checks import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices of a run are arranged. The result is the same, within rounding, on every mesh.

    The product of the sizes is the number of devices of all processes; where all are 1, one process works on its first
    device alone.

    Attributes:
      data: parts that the rows of a batch are spread over, >= 1.
      fsdp: parts that rows are spread over in addition, and that arrays are split into, >= 1; a block is gathered
        for its turn.
      tensor: parts that every large matrix is computed in, >= 1.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            require(getattr(self, field.name) >= 1, f"mesh.{field.name}", getattr(self, field.name), "1 or more")

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The parts along data, fsdp and tensor."""
        return self.data, self.fsdp, self.tensor

    @property
    def size(self) -> int:
        """The devices it takes."""
        return math.prod(self.sizes)

    @property
    def row_parts(self) -> int:
        """The parts that the rows of a batch are spread over."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        return ",".join(f"{field.name}={getattr(self, field.name)}" for field in dataclasses.fields(self))
