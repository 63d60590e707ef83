"""The recipes of docs/integrate.md, as they are written."""

import re
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import ROOT

from cluscomp_jax import CodebookArray, decompress, size_report

TEXT = (ROOT / "docs/integrate.md").read_text()
TITLES = [
    "Your own linen module",
    "Your own nnx module",
    "tunix",
    "A stack that `lax.scan` runs",
    "Any pytree",
    "Foreign blocks, calibrated and tuned",
]


def recipe(title: str) -> str:
    section = TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```python[a-z ]*\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    return code


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    found: dict[str, Any] = {"__name__": "recipes"}
    with jax.numpy_dtype_promotion("standard"):
        for title in TITLES:
            if title == "tunix" and find_spec("tunix") is None:
                continue
            exec(recipe(title), found)
            found[title] = dict(found)
    return found


def test_there_are_six() -> None:
    assert [
        title
        for title in re.findall(r"^## (.*)", TEXT, re.MULTILINE)
        if "```python" in TEXT.split(f"## {title}\n")[1].split("\n## ")[0]
    ] == TITLES


def test_linen(names: dict[str, Any]) -> None:
    it = names["Your own linen module"]
    want = it["net"].apply(decompress(it["clustered"]), it["x"])
    np.testing.assert_allclose(it["logits"], want, rtol=1e-4, atol=1e-5)


def test_nnx(names: dict[str, Any]) -> None:
    it = names["Your own nnx module"]
    assert float(it["losses"][-1]) < 0.9 * float(it["losses"][0])
    assert isinstance(it["stored"].up.kernel[...], CodebookArray)


@pytest.mark.skipif(find_spec("tunix") is None, reason="needs google-tunix")
def test_tunix(names: dict[str, Any]) -> None:
    it = names["tunix"]
    with jax.numpy_dtype_promotion("standard"):
        want, _ = decompress(it["clustered"])(it["tokens"], it["positions"], None, it["mask"])
    np.testing.assert_allclose(it["logits"], want, rtol=1e-4, atol=1e-5)


def test_scan(names: dict[str, Any]) -> None:
    it = names["A stack that `lax.scan` runs"]
    np.testing.assert_allclose(it["y"], it["forward"](decompress(it["clustered"]), it["x"]), rtol=1e-4, atol=1e-4)
    assert len(it["layers"]) == 6


def test_any_pytree(names: dict[str, Any]) -> None:
    it = names["Any pytree"]
    x, wanted = it["x"], it["forward"](it["tree"], it["x"])
    before, after = (
        float(jnp.mean(jnp.square(it["forward"](decompress(tree), x) - wanted)))
        for tree in (it["clustered"], it["result"])
    )
    assert after < 0.9 * before


def test_blocks(names: dict[str, Any]) -> None:
    it = names["Foreign blocks, calibrated and tuned"]
    assert len(size_report(it["blocks"]).matrices) == 12
    assert all(record["epoch_losses"][-1] < record["loss_before"] for record in it["summary"].blocks)
    assert it["y"].shape == it["inputs"].shape
