"""The result file: what is known of the machine, and the facts of every step. Written whole after every change."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NOT_BEGUN, RUNNING, DONE, FAILED, TIMED_OUT = "not begun", "running", "done", "failed", "timed out"


class Card:
    """The result of a run.

    Args:
      path: of the file.
      head: what is known before the first step.
      steps: names of the steps, in order.
    """

    def __init__(self, path: Path, head: dict[str, Any], steps: Iterable[str]):
        self.path = path
        self.content: dict[str, Any] = {
            **head,
            "finished": False,
            "seconds": 0.0,
            "device": None,
            "steps": {name: {"status": NOT_BEGUN, "seconds": 0.0, "facts": []} for name in steps},
        }
        self.write()

    def begin(self, name: str, limit: float) -> None:
        """Notes that a step runs; a file that says so at the end is one of a run that was cut off."""
        self.step(name).update(status=RUNNING, limit_seconds=limit)
        self.write()

    def add(self, name: str, fact: dict[str, Any]) -> None:
        """Adds a fact of a step; the fact "device" is one of the whole run."""
        if fact.get("name") == "device":
            self.content["device"] = self.content["device"] or fact
        else:
            self.step(name)["facts"].append(fact)
        self.write()

    def end(self, name: str, status: str, seconds: float, reason: str | None = None) -> None:
        """Notes how a step ended."""
        self.step(name).update(status=status, seconds=round(seconds, 2), **({"reason": reason} if reason else {}))
        self.content["seconds"] = round(sum(step["seconds"] for step in self.content["steps"].values()), 2)
        self.write()

    def finish(self, seconds: float) -> None:
        """Notes that the run came to its end."""
        self.content.update(finished=True, seconds=round(seconds, 2))
        self.write()

    def step(self, name: str) -> dict[str, Any]:
        """Returns the record of a step."""
        record: dict[str, Any] = self.content["steps"][name]
        return record

    def wrong(self, name: str) -> list[dict[str, Any]]:
        """Returns the facts of a step that were judged and are not right."""
        return [fact for fact in self.step(name)["facts"] if fact.get("right") is False]

    def write(self) -> None:
        """Puts the whole content in the place of the file's."""
        aside = self.path.with_name(f"{self.path.name}.tmp")
        aside.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, self.path)


def line_of(name: str, fact: dict[str, Any]) -> str:
    """Returns a fact as one line for a person."""
    parts = [f"{key} {_short(value)}" for key, value in fact.items() if key not in ("name", "right", "at_seconds")]
    verdict = {True: "right: ", False: "WRONG: "}.get(fact.get("right"), "")  # type: ignore[arg-type]
    return f"{name}: {verdict}{fact.get('name')}{': ' if parts else ''}{', '.join(parts)}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_short(each)}" for key, each in value.items()) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value[:8])) + (", ..." if len(value) > 8 else "") + "]"
    return str(value)
