"""Descriptions of cards: what ships, what a user gives, and what is said where the compiler is missing."""

import dataclasses

import jax
import pytest
from compilers import needs_compiler
from jax.experimental import topologies

from cluscomp_jax import llama
from cluscomp_jax.config.clustering import ClusterConfig, CompressionRule
from cluscomp_jax.config.mesh import MeshConfig
from cluscomp_jax.config.run import CompressConfig
from cluscomp_jax.errors import InputError
from cluscomp_jax.models.model import build_model
from cluscomp_jax.plan.program import Program, compile_program
from cluscomp_jax.plan.setting import layer_types_of
from cluscomp_jax.plan.shapes import AbstractDevice
from cluscomp_jax.plan.target import card_mesh, compiling_for, find_target, placement, shipped_targets
from cluscomp_jax.plan.training_programs import finetuning
from cluscomp_jax.plan.whole import finetuning_of
from cluscomp_jax.training import AXES, sharding_on

WIDE = llama.LlamaConfig(
    vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8,
    num_key_value_heads=8, head_dim=64,
)  # fmt: skip


def test_every_shipped_card_has_its_published_figures() -> None:
    published = {
        "a6000": (48, 768),
        "a100_80": (80, 2039),
        "h100": (80, 3352),
        "h200": (141, 4800),
        "l40s": (48, 864),
        "rtx4090": (24, 1008),
    }
    assert shipped_targets() == sorted(published)
    for name, (gigabytes, bandwidth) in published.items():
        card = find_target(name)
        assert 0.9 * gigabytes < card.memory_bytes / 2**30 <= gigabytes
        assert card.bandwidth / 1e9 == pytest.approx(bandwidth, rel=0.01)
        assert card.matrix_rate > 2 * card.vector_lr_scale > 1e13
    assert find_target("a6000").vector_lr_scale == pytest.approx(38.7e12, rel=0.01)
    assert find_target("h200").memory_bytes == 150_120_431_616
    assert find_target("rtx4090").vector_lr_scale == pytest.approx(82.6e12, rel=0.01)


def test_a_card_of_the_users_is_read(tmp_path) -> None:
    text = find_target("a6000").text.replace("core_count: 84", "core_count: 42")
    (tmp_path / "half.txtpb").write_text("\n".join(line for line in text.splitlines() if "matrix_rate" not in line))
    half = find_target(tmp_path / "half.txtpb")
    assert half.name == "half"
    assert half.vector_lr_scale == find_target("a6000").vector_lr_scale / 2
    assert half.matrix_rate == half.vector_lr_scale


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no positive core_count"),
        ("core_count: 4 fpus_per_core: 4 clock_rate_ghz: e memory_bandwidth: 1", "has no positive clock_rate_ghz"),
        (
            "core_count: 4 fpus_per_core: 4 clock_rate_ghz: 1 device_memory_size: 0 "
            "cuda_compute_capability { major: 9 minor: 0 }",
            "has no positive device_memory_size",
        ),
        (
            "core_count: 4 fpus_per_core: 4 clock_rate_ghz: 1",
            "its cuda_compute_capability is 0.0; .* for 8.0, 8.6, 8.9",
        ),
    ],
)
def test_a_description_without_its_figures_is_refused(tmp_path, text: str, message: str) -> None:
    (tmp_path / "card.txtpb").write_text(text)
    with pytest.raises(InputError, match=message):
        find_target(tmp_path / "card.txtpb")


def test_the_compute_capability_is_that_of_the_chip() -> None:
    published = {"a6000": (8, 6), "a100_80": (8, 0), "h100": (9, 0), "h200": (9, 0), "l40s": (8, 9), "rtx4090": (8, 9)}
    assert {name: find_target(name).capability for name in shipped_targets()} == published


@pytest.mark.parametrize(("found", "told"), [("major: 7 minor: 5", "7.5"), ("major: 8 minor: 1", "8.1"), ("", "0.0")])
def test_a_capability_without_kernels_is_refused(tmp_path, found: str, told: str) -> None:
    (tmp_path / "card.txtpb").write_text(find_target("a6000").text.replace("major: 8 minor: 6", found))
    with pytest.raises(InputError, match=rf"target card: its cuda_compute_capability is {told}; .*9\.0"):
        find_target(tmp_path / "card.txtpb")


def test_what_is_no_description_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="neither one of a100_80, a6000, h100, h200, l40s, rtx4090 nor a"):
        find_target("a5000")
    (tmp_path / "card.txtpb").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        find_target(tmp_path / "card.txtpb")


def test_a_missing_compiler_is_one_line_that_names_the_extra(monkeypatch) -> None:
    def missing(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(InputError, match=r'pip install "cluscomp-jax\[aot\]"'):
        placement(find_target("a6000"))


@needs_compiler
@pytest.mark.parametrize("name", shipped_targets())
def test_programs_compile_for_every_shipped_card(name: str) -> None:
    card = find_target(name)
    place = AbstractDevice(placement(card))
    x = place.array(256, 512)
    with compiling_for(card):
        traced = jax.jit(lambda a, b: (a @ b) @ b).trace(x, place.array(512, 512))
        memory = compile_program(Program("s", "n", traced, live_bytes=256 * 512 * 4 + 512 * 512 * 4 + 100))
    assert (memory.argument_bytes, memory.output_bytes) == ((256 + 512) * 512 * 4, 256 * 512 * 4)
    assert memory.held_bytes == 100
    assert memory.peak_bytes >= memory.argument_bytes + memory.output_bytes + 100


@pytest.mark.long
@needs_compiler
def test_what_a_mesh_shares_out_is_missing_on_each_card() -> None:
    """Of rows alone the whole model stays on every card; by fsdp and tensor a card holds its part of it."""
    cfg = CompressConfig(model=WIDE, cluster=ClusterConfig(rules=(CompressionRule(group_size=4, num_codes=16),)))
    model, card = build_model(WIDE), find_target("h100")
    held = {}
    with compiling_for(card):
        settings = layer_types_of(model, cfg, AbstractDevice(placement(card)), 1)
        for mesh in (MeshConfig(), *(MeshConfig(**{axis: 8}) for axis in AXES)):
            finetune = finetuning_of(cfg, mesh)
            sharding = sharding_on(card_mesh(card, finetune.mesh.sizes, AXES), model)
            (step,) = (p for p in finetuning(settings, finetune, sharding) if p.name == "step")
            held[mesh] = compile_program(step).argument_bytes
    whole = held[MeshConfig()]
    assert held[MeshConfig(data=8)] == pytest.approx(whole, rel=0.01)
    assert held[MeshConfig(fsdp=8)] < 0.2 * whole
    assert held[MeshConfig(tensor=8)] < 0.2 * whole


@needs_compiler
def test_a_description_that_xla_cannot_read_is_refused() -> None:
    with pytest.raises(InputError, match="XLA cannot read the description"):
        placement(dataclasses.replace(find_target("a6000"), text="nonsense {"))
