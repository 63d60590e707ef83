"""Pointers of Git LFS: a clone without `git lfs` leaves them where the large files should be."""

from pathlib import Path

from cluscomp_jax.errors import InputError

_START = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(path: Path) -> None:
    """Raises InputError where a file is a pointer of Git LFS and not the file that it names."""
    with path.open("rb") as file:
        if file.read(len(_START)) == _START:
            raise InputError(f"{path}: is a pointer of Git LFS, not the file itself; fetch that by `git lfs pull`")
