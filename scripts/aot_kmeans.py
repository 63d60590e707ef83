"""Compiles the programs of `fit_codebook` for a card that need not be here, and prints the device memory of each.

The numbers are XLA's own buffer assignment, ahead of time; nothing runs. "live" is what else the fit holds on the
device meanwhile: the caller's vectors, the blocks, the codes known so far.

    pip install ".[aot]"
    python scripts/aot_kmeans.py                                  # Llama-2-70B's gate_proj on an RTX A6000
    python scripts/aot_kmeans.py --vectors 11272192 --g 4 --codes 65500 --target FILE.txtpb
"""

import argparse
import os
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # still registers the CUDA compiler, and looks for no card

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from cluscomp_jax.kmeans import fit, lists, search, start, tree
from cluscomp_jax.kmeans.found import next_codebook

A6000 = Path(__file__).parent.parent / "cluscomp_jax" / "data" / "targets" / "rtx_a6000.txtpb"
GIB = 2**30


def describe(target: Path) -> Any:
    """Returns the sharding that places arrays on the one described card."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=target.read_text(), topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("card",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def programs(m: int, g: int, n: int, on_card: Any) -> dict[str, Any]:
    """Returns the programs of a fit, traced at its shapes, by name; in the order in which they run."""

    def placed(tree_: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_card), tree_)

    vectors = placed(jax.ShapeDtypeStruct((m, g), jnp.float32))
    key = placed(jax.eval_shape(jax.random.key, 0))
    scalar = placed(jax.ShapeDtypeStruct((), jnp.float32))
    turn = placed(jax.ShapeDtypeStruct((), jnp.int32))
    codebook = placed(jax.ShapeDtypeStruct((n, g), jnp.float32))
    traced = {"blocks": fit._blocks.trace(vectors, None)}
    blocks = placed(traced["blocks"].out_info)
    known = placed(jax.ShapeDtypeStruct(blocks.weights.shape, jnp.int32))
    traced["sound"] = fit._sound.trace(blocks)
    traced["sample"] = start.draw_sample.trace(blocks, key, num_codes=n, count=m)
    sample, mass = placed(traced["sample"].out_info)
    traced["rotation"] = tree.random_rotation.trace(key, turn, g=g)
    rotation = placed(traced["rotation"].out_info)
    traced["start"] = start._pick.trace(sample, mass, rotation, key, num_codes=n)
    traced["tree"] = tree.grow_tree.trace(codebook, rotation)
    grown = placed(traced["tree"].out_info)
    for name, longer in (("", 1), (" (last)", fit._SETTLING)):
        length = longer * fit._codes_searched(g) // tree.leaves_of(n)[1]
        traced["lists" + name] = lists.make_lists.trace(grown, codebook, length=length)
        made = placed(traced["lists" + name].out_info)
        traced["search" + name] = search.search_listed.trace(blocks, known, codebook, grown, made)
    found = placed(traced["search"].out_info)
    traced["update"] = next_codebook.trace(blocks, codebook, codebook, found, scalar, scalar)
    return traced


def total_bytes(tree_: Any) -> int:
    return sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(tree_) if not jnp.issubdtype(x.dtype, jax.dtypes.extended)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vectors", type=int, default=8192 * 28672 // 4, help="m")
    parser.add_argument("--g", type=int, default=4, help="weights per vector")
    parser.add_argument("--codes", type=int, default=65500, help="n, more than 256")
    parser.add_argument("--target", type=Path, default=A6000, help="description of the card")
    options = parser.parse_args()
    traced = programs(options.vectors, options.g, options.codes, describe(options.target))
    blocks = total_bytes(traced["blocks"].out_info)
    held = total_bytes(traced["blocks"].in_avals) + blocks + total_bytes(traced["search"].out_info.nearest)
    print(
        f"jax {jax.__version__}, {options.target.stem}, ahead of time: m={options.vectors:,} g={options.g} "
        f"n={options.codes:,}; vectors {total_bytes(traced['blocks'].in_avals) / GIB:.3f} GiB"
    )
    print("| program | arguments GiB | outputs GiB | temporaries GiB | live GiB | all GiB |\n" + "|---" * 6 + "|")
    largest = 0.0
    for name, program in traced.items():
        memory = program.lower().compile().memory_analysis()
        arguments = total_bytes(program.in_avals)
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        live = 0 if name == "blocks" else held - total_bytes(_held_arguments(name, traced))
        parts = [arguments, outputs, memory.temp_size_in_bytes, live]
        parts.append(sum(parts))
        largest = max(largest, parts[-1])
        print(f"| {name} | " + " | ".join(f"{part / GIB:.3f}" for part in parts) + " |", flush=True)
    print(f"largest: {largest / GIB:.3f} GiB")


def _held_arguments(name: str, traced: dict[str, Any]) -> list[Any]:
    """Returns those of a program's arguments that the fit holds anyway."""
    blocks, known = traced["blocks"].out_info, traced["search"].out_info.nearest
    if name.startswith("search") or name == "update":
        return [blocks, known]
    return [blocks] if name in ("sound", "sample") else []


if __name__ == "__main__":
    main()
