"""Bytes that a compiled GPU kernel asks of memory, counted in its own intermediate code. Knows no kernel's purpose.

Every load and store counts as its whole block, times the trips of the loops around it, times the programs of the grid:
what a mask leaves out is counted too.
"""

import dataclasses
import math
from typing import Any

from jaxlib.mlir import ir

from pallas_kernels import _compat

_ACCESSES = ("tt.load", "tt.store", "tt.atomic_rmw")


@dataclasses.dataclass(frozen=True)
class Access:
    """One load, store or atomic of a kernel.

    Attributes:
      argument: place of the array among the kernel's arguments.
      kind: "load", "store" or "atomic_rmw".
      elements: of one execution by one program.
      itemsize: bytes of an element.
      executions: by all programs together; None if a loop's length is known only at run time.
      gathered: whether its addresses come from another load.
    """

    argument: int
    kind: str
    elements: int
    itemsize: int
    executions: int | None
    gathered: bool

    @property
    def bytes(self) -> int | None:
        """Bytes of all executions."""
        return None if self.executions is None else self.elements * self.itemsize * self.executions


def read_accesses(bytecode: bytes, grid: tuple[int, ...]) -> list[Access]:
    """Returns the memory accesses of a Triton module, in the order of the text."""
    with _compat.triton_context():
        module = ir.Module.parse(bytecode)
        found: list[Access] = []

        def visit(op: Any) -> Any:
            # A store comes with a load of the old value, which nobody uses and the compiler drops.
            unused = op.operation.name == "tt.load" and not list(op.operation.results[0].uses)
            if op.operation.name in _ACCESSES and not unused:
                found.append(_read_access(op.operation, math.prod(grid)))
            return ir.WalkResult.ADVANCE

        module.operation.walk(visit)
        return found


def _read_access(op: Any, programs: int) -> Access:
    kind = op.name.removeprefix("tt.")
    value = op.results[0] if kind == "load" else op.operands[1]
    tensor: Any = ir.ShapedType(value.type) if isinstance(value.type, ir.RankedTensorType) else None
    element: Any = tensor.element_type if tensor else value.type
    elements = math.prod(tensor.shape) if tensor else 1
    trips: int | None = programs
    parent = op.parent
    while parent is not None and parent.name != "tt.func":
        if parent.name == "scf.for":
            length = _trips(parent)
            trips = None if trips is None or length is None else trips * length
        parent = parent.parent
    return Access(_argument(op.operands[0]), kind, elements, element.width // 8, trips, _is_gather(op.operands[0]))


def _trips(loop: Any) -> int | None:
    """Returns how often an scf.for runs, None if its bounds are no constants."""
    low, high, step = (_constant(operand) for operand in list(loop.operands)[:3])
    return None if low is None or high is None or not step else -(-(high - low) // step)


def _constant(value: Any) -> int | None:
    """Returns an integer known at compile time, None if it is not."""
    if isinstance(value.owner, ir.Block):
        return None
    op = value.owner
    if op.name == "arith.constant":
        return int(ir.IntegerAttr(op.attributes["value"]).value)
    if op.name != "arith.addi":
        return None
    first, second = (_constant(operand) for operand in op.operands)
    return None if first is None or second is None else first + second


def _argument(value: Any) -> int:
    """Returns which argument of the function a pointer was made of."""
    while not isinstance(value.owner, ir.Block):
        value = value.owner.operands[0]
    return int(ir.BlockArgument(value).arg_number)


def _is_gather(value: Any) -> bool:
    """Returns whether a load is on the way to these addresses."""
    if isinstance(value.owner, ir.Block):
        return False
    op = value.owner
    return op.name == "tt.load" or any(_is_gather(operand) for operand in op.operands)
