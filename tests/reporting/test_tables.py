from pathlib import Path

import numpy as np
import pytest

from cluscomp_jax.reporting.tables import entropy_saving, error_map, format_bytes, format_table, save_figure

MATRICES = [
    {"path": f"model/layers/{i}/{name}/kernel", "relative_error": error}
    for i, name, error in [(0, "mlp/up_proj", 0.5), (0, "mlp/down_proj", 0.25), (2, "mlp/up_proj", 0.125)]
]


def test_columns_are_aligned() -> None:
    table = format_table(("name", "n"), [("a", 10), ("long name", 7)])
    assert table.splitlines() == ["name        n", "---------  --", "a          10", "long name   7"]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536 * 1024, "1.5 MiB"), (2**42, "4.0 TiB")]
)
def test_bytes_are_given_in_the_largest_unit(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_the_map_has_a_row_per_name_and_a_gap_where_nothing_was_compressed() -> None:
    names, errors = error_map(MATRICES, "model/layers")
    assert names == ["mlp/up_proj", "mlp/down_proj"]
    np.testing.assert_array_equal(errors, [[0.5, np.nan, 0.125], [0.25, np.nan, np.nan]])


@pytest.mark.parametrize("tuned", [True, False])
def test_the_figure_is_a_png_with_or_without_tuning(tmp_path: Path, tuned: bool) -> None:
    losses = {"loss_before": 2.0, "loss_after": 1.0} if tuned else {}
    save_figure(tmp_path / "f.png", [{"index": 0, **losses}], MATRICES, blocks_path="model/layers")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_the_saving_of_entropy_coding_counts_index_bits_against_all_bits() -> None:
    """[4, 8] in pairs: 16 entries of 2 bits that hold 1.5 each, and a codebook of 4 x 2 halves: 8 of 160 bits."""
    matrix = {"shape": [4, 8], "g": 2, "num_codes": 4, "axis": "out", "index_entropy": 1.5, "bits": 160}
    assert entropy_saving([matrix, matrix]) == pytest.approx(8 / 160)
