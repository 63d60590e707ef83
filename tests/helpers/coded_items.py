"""Items coded by zstd, as earlier releases could write them; orbax writes them here."""

import orbax.checkpoint as ocp

from cluscomp_jax.checkpoint.orbax_items import quiet
from cluscomp_jax.core import trees


def write_coded_item(folder, arrays):
    """Writes {path: array} as an item whose files are coded; takes the place of `orbax_items.write_item`."""
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False, use_compression=True)
    with quiet(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.absolute(), trees.unflatten(arrays))
