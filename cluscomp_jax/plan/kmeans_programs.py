"""The programs of `kmeans.fit_codebook`, in the order in which it calls them, with what it holds meanwhile.

The one place outside kmeans that knows its pieces: they are private to the fit, and its own are what is compiled.
"""

from collections.abc import Iterator
from typing import Any

import jax

from cluscomp_jax.kmeans import fit, init, probe_lists, search, tree
from cluscomp_jax.kmeans.assignment import next_codebook
from cluscomp_jax.plan.program import Program
from cluscomp_jax.plan.shapes import AbstractDevice, nbytes

STAGE = "cluster"


def fit_programs(
    place: AbstractDevice, m: int, g: int, n: int, *, weighted: bool, iterations: int, calls: float
) -> Iterator[Program]:
    """Yields the programs of one fit of n codes to m vectors [m, g], which has the device to itself.

    Args:
      place: the device.
      weighted: whether vectors have weights.
      iterations: of k-means.
      calls: fits of these sizes in a whole run.
    """
    vectors = place.array(m, g)
    weights = place.array(m) if weighted else None
    key, scalar = place.key(), place.array()

    def program(name: str, traced: Any, held: int, count: float = 1.0) -> Program:
        return Program(STAGE, name, traced, held, calls * count)

    gpu = fit.on_gpu(vectors)
    traced = fit.make_blocks.trace(vectors, weights, gpu=gpu)
    yield program("blocks", traced, nbytes((vectors, weights)))
    blocks = place.like(traced.out_info)
    held = nbytes(blocks)
    yield program("check", fit.is_finite.trace(blocks), held)
    traced = init.draw_sample.trace(blocks, key, num_codes=n, count=m)
    yield program("sample", traced, held)
    if m <= n:
        return
    sample, mass = place.like(traced.out_info)
    held += nbytes((sample, mass))
    traced = tree.random_rotation.trace(key, place.array(dtype="int32"), g=g)
    yield program("rotation", traced, held, iterations + 1)
    rotation = place.like(traced.out_info)
    yield program("start", init.pick.trace(sample, mass, rotation, key, num_codes=n), held + nbytes(rotation))
    codebook = place.array(n, g)
    previous = place.array(*blocks.weights.shape, dtype="int32")
    held += nbytes((codebook, codebook, previous))
    if fit.compares_all(n, gpu=gpu):
        traced = search.search_all.trace(blocks, codebook)
        found = place.like(traced.out_info)
        yield program("search", traced, held + nbytes(found), iterations + 1)
    else:
        yield from _searches(place, blocks, previous, codebook, rotation, iterations, held, program)
        found = _found(place, blocks, previous, codebook, rotation)
    traced = next_codebook.trace(blocks, codebook, codebook, found, scalar, scalar)
    yield program("update", traced, held + nbytes(found), iterations)
    yield program("index", fit.in_order.trace(found.nearest, m), held + nbytes(found))


def _searches(
    place: AbstractDevice,
    blocks: Any,
    previous: Any,
    codebook: Any,
    rotation: Any,
    iterations: int,
    held: int,
    program: Any,
) -> Iterator[Program]:
    """Yields what finds the nearest codes by a tree: in the iterations, and at last on longer lists."""
    n, g = codebook.shape
    # While it searches, a fit still holds the result of the search before; its codes are the previous ones.
    before = nbytes(_found(place, blocks, previous, codebook, rotation)) - nbytes(previous)
    traced = tree.grow_tree.trace(codebook, rotation)
    yield program("tree", traced, held + before, iterations + 1)
    grown = place.like(traced.out_info)
    for name, longer, count in (("", 1, iterations), (" (last)", fit.SETTLING, 1)):
        traced = probe_lists.make_probe_lists.trace(grown, codebook, length=_length(n, g, longer))
        yield program("lists" + name, traced, held + before + nbytes(grown), count)
        made = place.like(traced.out_info)
        traced = search.search_listed.trace(blocks, previous, codebook, grown, made)
        yield program("search" + name, traced, held + before + nbytes((grown, made)), count)


def _found(place: AbstractDevice, blocks: Any, previous: Any, codebook: Any, rotation: Any) -> Any:
    """Returns the shapes of what a search finds."""
    n, g = codebook.shape

    def searched(blocks: Any, previous: Any, codebook: Any, rotation: Any) -> Any:
        grown = tree.grow_tree(codebook, rotation)
        made = probe_lists.make_probe_lists(grown, codebook, length=_length(n, g, 1))
        return search.search_listed(blocks, previous, codebook, grown, made)

    return place.like(jax.eval_shape(searched, blocks, previous, codebook, rotation))


def _length(n: int, g: int, longer: int) -> int:
    return longer * fit.codes_searched(g) // tree.leaves_of(n)[1]
