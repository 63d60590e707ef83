"""The texts that ship with the package, by name. Knows nothing of tokenizers or of what the texts are used for.

The texts are English Wikipedia prose under CC BY-SA 3.0 (LICENSE.txt and wiki_attribution.json in the same folder).
"""

import gzip
from importlib import resources
from pathlib import Path

from cluscomp_jax.errors import InputError

_FILES = {
    "wiki_train": "wiki_train.txt.gz",
    "wiki_test": "wiki_test.txt.gz",
    "wiki_attribution": "wiki_attribution.json",
    "calibration_starts": "calibration_starts.txt",
}


def path(name: str) -> Path:
    """Returns the path of a shipped file.

    Args:
      name: "wiki_train" (72 articles, 2.0 million characters, gzip), "wiki_test" (18 other articles, 0.4 million,
        gzip), "wiki_attribution" (JSON: title, revision and split of every article) or "calibration_starts"
        (one token position in "wiki_train" per line).

    Raises:
      InputError: no shipped file has that name.
    """
    if name not in _FILES:
        raise InputError(f"no text called {name!r} ships with the package; there are {', '.join(_FILES)}")
    return Path(str(resources.files(__name__).joinpath(_FILES[name])))


def text(name: str) -> str:
    """Returns the contents of a shipped file, decompressed, as UTF-8 text.

    Raises:
      InputError: no shipped file has that name.
    """
    file = path(name)
    contents = file.read_bytes()
    return (gzip.decompress(contents) if file.suffix == ".gz" else contents).decode("utf-8")


def calibration_starts() -> tuple[int, ...]:
    """Returns the 64 fixed calibration positions: token indices into "wiki_train" by SmolLM2's tokenizer.

    Every quality figure of the project calibrates on the 512 tokens from each of the first 16 (or all 64).
    """
    return tuple(int(line) for line in text("calibration_starts").split())
