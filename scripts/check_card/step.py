"""The process of one step: writes facts to its parent as they are found. It ends when its parent does."""

import argparse
import importlib
import json
import logging
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from check_card import LIMITS

_MODULES = {name: "clustering" if name == "kmeans" else name for name in LIMITS}


class Step:
    """What a step is given.

    Attributes:
      dry: whether shapes are tiny and the device is a CPU.
      limit: seconds that the process may take.
      card: the result file, for facts of earlier steps.
      tiles: where a table of tiles may be written.
    """

    def __init__(self, *, dry: bool, limit: float, card: Path, tiles: Path, began: float, descriptor: int):
        self.dry, self.limit, self.card, self.tiles = dry, limit, card, tiles
        self._began, self._descriptor, self._lock = began, descriptor, threading.Lock()

    @property
    def remaining(self) -> float:
        """Seconds until the process is killed."""
        return self._began + self.limit - time.monotonic()

    def fact(self, name: str, **fields: Any) -> None:
        """Tells one fact; `right` among the fields is a judgement."""
        fact = {"name": name, **fields, "at_seconds": round(time.monotonic() - self._began, 2)}
        line = json.dumps(_plain(fact), allow_nan=False) + "\n"
        with self._lock:
            os.write(self._descriptor, line.encode())

    def known(self, step: str, name: str) -> dict[str, Any] | None:
        """Returns the last fact of that name of an earlier step, None where it has none."""
        steps = json.loads(self.card.read_text(encoding="utf-8"))["steps"]
        facts = [fact for fact in steps[step]["facts"] if fact["name"] == name]
        return facts[-1] if facts else None


def _plain(value: Any) -> Any:
    """Returns the value in types of JSON, which has no infinity: such numbers become words."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else str(number)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one step; returns the exit code of its process."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="check_card.py step")
    parser.add_argument("name", choices=LIMITS)
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("--card", type=Path, required=True)
    parser.add_argument("--tiles", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args(argv)
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    logging.basicConfig(level=logging.WARNING)
    step = Step(
        dry=options.dry,
        limit=options.limit,
        card=options.card,
        tiles=options.tiles,
        began=began,
        descriptor=int(os.environ["CHECK_CARD_FD"]),
    )
    try:
        _tell_device(step)
        importlib.import_module(f"check_card.{_MODULES[options.name]}").run(step)
    except Exception as error:
        traceback.print_exc()
        first = next(iter(str(error).splitlines()), "")
        print(f"{type(error).__name__}: {first}", file=sys.stderr, flush=True)
        return 1
    return 0


def _watch(parent: int) -> None:
    """Ends this process when its parent has ended, and with it the hold on the card."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _tell_device(step: Step) -> None:
    """Tells what JAX says of the device.

    Raises:
      RuntimeError: JAX has no GPU, and the run is not dry.
    """
    import jax

    device = jax.devices()[0]
    if not step.dry and device.platform != "gpu":
        raise RuntimeError(f"JAX {jax.__version__} runs on {device.platform}, not on a GPU; install jax with CUDA")
    memory = device.memory_stats() or {}
    step.fact(
        "device",
        kind=device.device_kind,
        platform=device.platform,
        compute_capability=getattr(device, "compute_capability", None),
        platform_version=getattr(device.client, "platform_version", None),
        bytes_for_jax=memory.get("bytes_limit"),
    )
