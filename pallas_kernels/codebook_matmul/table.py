"""Tiles that were found fastest on a card, in place of the heuristic's; a JSON file that `verify --tune` writes.

with TUNED(read_table("a6000.json")):
    step(...)                      # programs traced inside take their tiles from the table
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.codebook_matmul.config import GemmConfig, Steps, gemm_config, padded_group

Key = tuple[int, ...]
"""(m, depth, width, g, n, itemsize) of a product, as in `gemm_config`; of a trellis index (..., step_bits, 1 if its
streams run along the width, else 0)."""
Table = tuple[tuple[Key, GemmConfig], ...]

TUNED: Any = jax.make_user_context(())  # type: ignore[no-untyped-call]
"""The table in use; () is none."""


def key_of(m: int, depth: int, width: int, *, g: int, n: int, itemsize: int, steps: Steps | None) -> Key:
    """Returns the key of a product, whose arguments are those of `gemm_config`."""
    plain = (m, depth, width, g, n, itemsize)
    return plain if steps is None else (*plain, steps.bits, int(steps.wide))


def tile_of(key: Key) -> GemmConfig:
    """Returns the tiles of a product: those of the table in use, else the heuristic's."""
    m, depth, width, g, n, itemsize, *steps = key
    tuned = dict(TUNED.value).get(key)
    cut = Steps(steps[0], bool(steps[1])) if steps else None
    return tuned or gemm_config(m, depth, width, g=g, n=n, itemsize=itemsize, steps=cut)


def read_table(file: str | Path) -> Table:
    """Returns the table of a file.

    Raises:
      ValueError: the file is no such table, or a tile could not be compiled; one line that names the entry.
    """
    try:
        entries = json.loads(Path(file).read_text(encoding="utf-8"))
        table = tuple((_key(entry["product"]), GemmConfig(**entry["tile"])) for entry in entries)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: no table of tiles: {type(error).__name__}: {error}") from error
    for key, tile in table:
        _check(tile, key, f"{file}: product {list(key)}")
    return table


def write_table(file: str | Path, table: Table) -> None:
    """Writes the table as JSON, an entry a line; a file that is there is refused.

    Raises:
      FileExistsError: `file` is there.
    """
    lines = ",\n".join(json.dumps({"product": key, "tile": dataclasses.asdict(tile)}) for key, tile in table)
    with Path(file).open("x", encoding="utf-8") as stream:
        stream.write(f"[\n{lines}\n]\n")


def _key(values: Any) -> Key:
    key = tuple(map(int, values))
    if len(key) not in (6, 8):
        raise ValueError(f"a product has 6 numbers, of a trellis index 8, not {len(key)}")
    return key


def _check(tile: GemmConfig, key: Key, where: str) -> None:
    """Raises ValueError unless the tile's numbers can be compiled for the product."""
    lanes = padded_group(key[3])
    least = {"block_m": 16, "block_n": max(16, lanes), "block_k": max(16, lanes), "splits": 1, "num_warps": 1}
    for name, low in least.items():
        value = getattr(tile, name)
        if not isinstance(value, int) or value < low or value & (value - 1):
            raise ValueError(f"{where}: {name} is {value!r}; it must be a power of two, {low} or more")
    if not isinstance(tile.num_stages, int) or tile.num_stages < 1:
        raise ValueError(f"{where}: num_stages is {tile.num_stages!r}; it must be 1 or more")
