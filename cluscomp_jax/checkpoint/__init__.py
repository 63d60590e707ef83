"""Compressed checkpoints and run folders on disk: the manifest, bit-packed codes, orbax items, resume."""
