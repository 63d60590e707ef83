import pytest

from cluscomp_jax.reporting.tables import MATRIX_HEADER, format_bytes, format_table, matrix_rows


def test_columns_are_aligned() -> None:
    table = format_table(("name", "n"), [("a", 10), ("long name", 7)])
    assert table.splitlines() == ["name        n", "---------  --", "a          10", "long name   7"]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536 * 1024, "1.5 MiB"), (2**42, "4.0 TiB")]
)
def test_bytes_are_given_in_the_largest_unit(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_a_matrix_has_a_cell_under_every_head() -> None:
    matrix = {
        "path": "a/kernel", "shape": [4, 8], "g": 2, "num_codes": 4, "axis": "out", "bits_per_weight": 5.0,
        "relative_error": 0.25,
    }  # fmt: skip
    (row,) = matrix_rows([matrix])
    assert dict(zip(MATRIX_HEADER, row, strict=True)) == {
        "matrix": "a/kernel", "shape": "4x8", "g": "2", "codes": "4", "axis": "out", "bits/weight": "5.000",
        "relative error": "0.25000",
    }  # fmt: skip
