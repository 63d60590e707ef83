import sys

import numpy as np
import pytest

from cluscomp_jax.stages import StageClock, process_peak_rss_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot be reset")
def test_the_peak_of_the_process_outlives_the_resets_of_stages() -> None:
    size = 64 * 2**20
    clock = StageClock()
    with clock("small"):
        pass
    before = process_peak_rss_bytes()
    held = np.ones(2 * before, np.uint8)  # between stages, and more than any before
    assert held.nbytes > size
    del held
    for _ in range(2):
        with clock("small"):
            pass
    peak = process_peak_rss_bytes()
    assert peak > 2 * before
    assert clock.to_dict()["small"]["peak_rss_bytes"] < peak
