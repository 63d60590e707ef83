"""Tokens to text one at a time: no half character, and no text that a stop string may still take back.

Knows no model; the tokenizer is one of transformers'.
"""

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"
"""What tokenizers write for bytes that are no whole character yet."""


class TextStream:
    """The text of one sequence as it grows.

    Attributes:
      stopped: whether a stop string was met; further tokens are then ignored.
      text: everything that was given out so far.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = ()):
        """Begins an empty text; it ends before the one of `stop_strings` complete first, the longest of several.

        So the end does not depend on how tokens cut the text. None of the strings may be empty.
        """
        self._tokenizer, self._stops = tokenizer, tuple(stop_strings)
        self._tokens: list[int] = []
        self._context = self._shown = 0  # what is between them is decoded again, because spacing depends on it
        self._held = ""
        self.stopped = False
        self.text = ""

    def push(self, token: int) -> str:
        """Returns the text that is certain with one more token, often none."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        before, whole = self._decode(self._shown), self._decode(len(self._tokens))
        if whole.endswith(_INCOMPLETE):
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        self._held += whole[len(before) :]
        return self._give(self._certain())

    def close(self) -> str:
        """Returns what was held back, at the end of the sequence."""
        if self.stopped:
            return ""
        before, whole = self._decode(self._shown), self._decode(len(self._tokens))
        self._shown = len(self._tokens)
        self._held += whole[len(before) :]
        return self._give(len(self._held))

    def _decode(self, end: int) -> str:
        return self._tokenizer.decode(self._tokens[self._context : end], skip_special_tokens=True)

    def _certain(self) -> int:
        """Returns how much of the held text can be given out; notes where a stop string ends it."""
        places = [(self._held.find(stop), len(stop)) for stop in self._stops]
        found = [(place + length, place) for place, length in places if place >= 0]
        if found:
            self.stopped = True
            return min(found)[1]
        for start in range(len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self._stops):
                return start
        return len(self._held)

    def _give(self, count: int) -> str:
        given, self._held = self._held[:count], self._held[count:]
        self.text += given
        return given
