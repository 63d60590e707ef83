"""The configs that ship load, and cost the bits that their first line says."""

import re
from pathlib import Path

import pytest
from paths import ROOT

from cluscomp_jax.clustering.rules import total_bits_per_weight
from cluscomp_jax.config.run import load_config
from cluscomp_jax.models.model import build_model
from cluscomp_jax.plan import preset_config

CONFIGS = ROOT / "configs"
PRESETS = {
    "Llama-2-7B": "llama-2-7b",
    "Llama-2-13B": "llama-2-13b",
    "Llama-2-70B": "llama-2-70b",
    "Llama-3-8B": "llama-3-8b",
    "Llama-3-70B": "llama-3-70b",
}
LLAMAS = {"llama_4bit": 4, "llama_3bit": 3, "llama_2bit": 2, "llama_1bit": 1, "llama_70b_1bit": 1}
COMPRESSING = sorted(CONFIGS.glob("*.toml"))
SMOLLM2 = {"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576),
           "gate": (576, 1536), "up": (576, 1536), "down": (1536, 576)}  # fmt: skip


def test_every_shipped_config_is_tested_here() -> None:
    own = {"paper", "smollm2_135m_3bit", "smollm2_135m_4bit"}
    assert {path.stem for path in CONFIGS.glob("*.toml")} == LLAMAS.keys() | own
    named = [name for config in LLAMAS for name in PRESETS if f"{name}: " in (CONFIGS / f"{config}.toml").read_text()]
    assert sorted(named) == sorted([*PRESETS] * 4)


def test_the_demos_config_costs_the_bits_it_says() -> None:
    path = CONFIGS / "smollm2_135m_3bit.toml"
    (rule,) = load_config(path).cluster.rules
    assert round(total_bits_per_weight(SMOLLM2, g=rule.group_size, num_codes=rule.num_codes), 2) == 3.05
    assert "3.05 bits per weight" in path.read_text()


def test_shared_codebooks_cost_the_bits_the_config_says() -> None:
    path = CONFIGS / "smollm2_135m_4bit.toml"
    cluster = load_config(path).cluster
    (rule,) = cluster.rules
    assert cluster.tie_codebooks == "block"
    cost = total_bits_per_weight(SMOLLM2, g=rule.group_size, num_codes=rule.num_codes, codebooks=1)
    assert f"{cost:.2f} bits per weight" in path.read_text()


@pytest.mark.parametrize("path", COMPRESSING, ids=lambda path: path.stem)
def test_every_config_loads(path: Path) -> None:
    cfg = load_config(path)
    assert f"configs/{path.name}" in path.read_text().split("\n\n")[0]
    assert cfg.calibration.samples >= 1


@pytest.mark.parametrize(("config", "bits"), LLAMAS.items())
def test_a_config_costs_the_bits_it_says(config: str, bits: int) -> None:
    path = CONFIGS / f"{config}.toml"
    (rule,) = load_config(path).cluster.rules
    said = re.findall(r"^#   (\S+): ([\d.]+)$", path.read_text(), re.MULTILINE)
    assert said
    for name, cost in said:
        shapes = build_model(preset_config(PRESETS[name])).block_shapes(0)
        kernels = {kernel: shape for kernel, shape in shapes.items() if kernel.endswith("/kernel")}
        costs = total_bits_per_weight(kernels, g=rule.group_size, num_codes=rule.num_codes)
        assert float(cost) == pytest.approx(costs, abs=0.006)
        assert bits - 0.3 < costs < bits + 0.2
