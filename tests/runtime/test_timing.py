import sys

import numpy as np
import pytest

from cluscomp_jax.reporting.tables import stage_rows
from cluscomp_jax.runtime import timing
from cluscomp_jax.runtime.timing import StageTimer, process_peak_rss_bytes


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot be reset")
def test_the_peak_of_the_process_outlives_the_resets_of_stages() -> None:
    size = 64 * 2**20
    clock = StageTimer(owns_process=True)
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


def test_a_clock_in_anothers_process_measures_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_reset_peak", "_noted_peak", "return_freed_memory"):
        monkeypatch.setattr(timing, name, lambda name=name: pytest.fail(f"{name} was called"))
    clock = StageTimer()
    with clock("small"), clock.concurrent("both"):
        clock.release()
    found = clock.to_dict()
    assert {name: stage["peak_rss_bytes"] for name, stage in found.items()} == {"both": None, "small": None}
    assert all(stage["seconds"] >= 0 for stage in found.values())
    assert [(name, peak) for name, _, peak in stage_rows(found)] == [("both", "-"), ("small", "-")]
