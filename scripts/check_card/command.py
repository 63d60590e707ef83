"""The command: runs the steps one after the other, each in a process with a limit, and keeps the result file.

This process imports no JAX: the card's memory is the steps'.
"""

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from check_card import LIMITS, card, machine

SCRIPT = Path(__file__).resolve().parent.parent / "check_card.py"
ROOT = SCRIPT.parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    began = time.monotonic()
    options = _options(argv)
    steps = [name for name in LIMITS if name in options.only] if options.only else list(LIMITS)
    environment = machine.child_environment(options.dry)
    head: dict[str, Any] = {
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "dry": options.dry,
        "asked_for": steps,
        "cards": machine.nvidia_smi(),
        "versions": machine.versions(),
        "project": machine.project(ROOT),
        "environment": environment,
    }
    found = card.Card(options.out, head, LIMITS)
    signal.signal(signal.SIGTERM, _interrupt)
    cards = ", ".join(" ".join(each.values()) for each in head["cards"]) or "no card reported by a driver"
    print(f"machine: {cards}; jax {head['versions'].get('jax')}; commit {head['project']['commit']}", flush=True)
    try:
        run_steps(found, steps, options.seconds, environment, tiles=options.tiles, dry=options.dry)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    found.finish(time.monotonic() - began)
    return verdict(found, steps)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the checked options; a wrong one ends the process with 2."""
    parser = argparse.ArgumentParser(
        prog="check_card.py", description="Measure and check this project on an NVIDIA GPU.", allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="the result, a new JSON file")
    parser.add_argument("--only", action="append", choices=LIMITS, help="a step; may be repeated; all")
    parser.add_argument("--seconds", type=float, default=sum(LIMITS.values()), help="limit of all steps; %(default)g")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, to try the command itself")
    options = parser.parse_args(argv)
    options.out = options.out.absolute()
    options.tiles = options.out.with_name(f"{options.out.stem}.tiles.json")
    if not 0 < options.seconds < float("inf"):
        parser.error(f"--seconds {options.seconds:g}: it must be a number above 0")
    if not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: {options.out.parent} is no folder; make it first")
    for path in (options.out, options.tiles):
        if path.exists() or path.is_symlink():
            parser.error(f"--out {options.out}: {path} is there and nothing is overwritten; choose another name")
    if not options.dry and not machine.has_card():
        parser.error("there is no NVIDIA GPU on this machine; --dry tries the command on the CPU")
    return options


def run_steps(
    found: card.Card, steps: Sequence[str], seconds: float, environment: Mapping[str, str], *, tiles: Path, dry: bool
) -> None:
    """Runs the steps in order. What one leaves of its time is shared out to those that follow, by their limits."""
    whole = seconds * sum(LIMITS[name] for name in steps) / sum(LIMITS.values())
    deadline = time.monotonic() + whole
    inherited = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    for place, name in enumerate(steps):
        share = LIMITS[name] / sum(LIMITS[later] for later in steps[place:])
        limit = max(0.0, deadline - time.monotonic()) * share
        command = [sys.executable, str(SCRIPT), "step", name, "--limit", f"{limit:.1f}", "--card", str(found.path)]
        command += ["--tiles", str(tiles), *(["--dry"] if dry else [])]
        run_step(found, name, command, limit, {**inherited, **environment})


def run_step(found: card.Card, name: str, command: Sequence[str], limit: float, environment: Mapping[str, str]) -> str:
    """Runs a process, adds the facts that it writes to the file descriptor CHECK_CARD_FD, and returns its status.

    Args:
      found: the result.
      name: of the step.
      command: of the process.
      limit: seconds after which it is killed.
      environment: of the process, whole.
    """
    found.begin(name, round(limit, 1))
    began = time.monotonic()
    read, write = os.pipe()
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                pass_fds=[write],
                env={**environment, "CHECK_CARD_FD": str(write)},
                start_new_session=True,
            )
        finally:
            os.close(write)
        status: str = card.FAILED
        reason: str | None = "interrupted"
        try:
            ended = _gather(found, name, read, process, began + limit)
            status, reason = _status(ended, limit, said)
        finally:
            _kill(process)
            os.close(read)
            found.end(name, status, time.monotonic() - began, reason)
            print(f"{name}: {status}, {time.monotonic() - began:.1f} s{f': {reason}' if reason else ''}", flush=True)
    return status


def _gather(found: card.Card, name: str, read: int, process: "subprocess.Popen[bytes]", deadline: float) -> int | None:
    """Adds facts until the process ends, and returns its exit status; None: it had not ended at the deadline."""
    unread = b""
    while select.select([read], [], [], max(0.0, deadline - time.monotonic()))[0]:
        piece = os.read(read, 2**16)
        if not piece:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(max(0.0, deadline - time.monotonic()))
            return None
        *lines, unread = (unread + piece).split(b"\n")
        for line in lines:
            fact = json.loads(line)
            found.add(name, fact)
            print(card.line_of(name, fact), flush=True)
    return None


def _status(ended: int | None, limit: float, said: Any) -> tuple[str, str | None]:
    """Returns (status, reason) of a step whose process ended so."""
    if ended is None:
        return card.TIMED_OUT, f"it had not ended after {limit:.0f} s and was killed"
    if ended == 0:
        return card.DONE, None
    said.seek(0)
    lines = [line for line in said.read().decode("utf-8", "replace").splitlines() if line.strip()]
    silent = f"killed by signal {-ended}" if ended < 0 else f"exit status {ended}"
    return card.FAILED, lines[-1].strip()[:500] if lines else silent


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process and what it started, and returns when it is gone, because the next one needs the card's memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def verdict(found: card.Card, steps: Sequence[str]) -> int:
    """Prints what all came to; returns the exit code."""
    wrong = sum(len(found.wrong(name)) for name in steps)
    judged = sum("right" in fact for name in steps for fact in found.step(name)["facts"])
    done = sum(found.step(name)["status"] == card.DONE for name in steps)
    print(f"{done} of {len(steps)} steps done, {judged - wrong} of {judged} values right; {found.path}")
    return 0 if done == len(steps) and not wrong else 1


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt
