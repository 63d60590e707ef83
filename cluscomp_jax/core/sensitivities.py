"""What errors of kernels and of their outputs cost, as one part measures it and others use and store it."""

from typing import NamedTuple

import numpy as np


class Sensitivities(NamedTuple):
    """What errors cost.

    Attributes:
      kernels: {path: loss in nats per token, by which a relative squared error of 1 of the kernel would raise it}.
      outputs: {path: float32 [d_out], sum_i F_io of every output, >= 0}.
    """

    kernels: dict[str, float]
    outputs: dict[str, np.ndarray]
