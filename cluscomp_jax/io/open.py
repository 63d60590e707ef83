"""Opens whatever names a model: a Hugging Face folder or hub id, a GGUF file, a compressed checkpoint.

Knows which reader serves which, and nothing of how they read.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal

from cluscomp_jax.checkpoint.manifest import MANIFEST_NAME
from cluscomp_jax.checkpoint.reader import open_checkpoint
from cluscomp_jax.checkpoint.run_folder import RUN_NAME
from cluscomp_jax.errors import InputError
from cluscomp_jax.io.gguf.header import is_gguf
from cluscomp_jax.io.hf.aqlm_source import AqlmSource, is_aqlm
from cluscomp_jax.io.hf.carried import Carried, carried_of, open_carried
from cluscomp_jax.io.hf.hub import download
from cluscomp_jax.io.hf.safetensors_source import SafetensorsSource, read_config
from cluscomp_jax.io.tokenizer import load_tokenizer
from cluscomp_jax.models.model import Model, build_model
from cluscomp_jax.models.nesting import nesting_of
from cluscomp_jax.models.source import ParamSource
from cluscomp_jax.runtime.json_files import read_object

_HASHED_BYTES = 10**9
_PIECES, _PIECE_BYTES = 256, 2**16
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def _nothing() -> None:
    return None


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model ready to be read.

    Attributes:
      kind: "hf" (safetensors), "gguf", "compressed", or "aqlm" (safetensors with compressed matrices).
      config: the family's config.
      model: the Model of that config.
      source: gives its parameters, block by block.
      name: what it is called in reports: a hub id, or the name of the file or folder.
      files: the files it is made of, in order; of a compressed checkpoint its manifest, which lists the others.
      tokenizer_loader: what `load_tokenizer` calls.
      carried_loader: gives `carried`.
    """

    kind: Literal["hf", "gguf", "compressed", "aqlm"]
    config: Any
    model: Model
    source: ParamSource
    name: str
    files: tuple[Path, ...]
    tokenizer_loader: Callable[[], Any]
    carried_loader: Callable[[], Carried | None] = _nothing

    @functools.cached_property
    def carried(self) -> Carried | None:
        """What is around the model where it is the text model of a larger one, or None; of a checkpoint, verified.

        Raises:
          InputError: a file of it is damaged.
        """
        return self.carried_loader()

    def load_tokenizer(self) -> Any:
        """Returns the transformers tokenizer. Raises InputError if the model carries none."""
        return self.tokenizer_loader()

    @functools.cached_property
    def origin(self) -> dict[str, Any]:
        """Provenance: {"name", "kind", "files": [{"name", "bytes", "sha256"}]}.

        Where all make up 1 GB or more, "sampled_sha256" replaces "sha256": of 64 KiB at 256 places of each file.
        """
        whole = sum(path.stat().st_size for path in self.files) < _HASHED_BYTES
        files: list[dict[str, Any]] = []
        for path in self.files:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest() if whole else _sampled_digest(file)
            kind = "sha256" if whole else "sampled_sha256"
            files.append({"name": path.name, "bytes": path.stat().st_size, kind: digest})
        return {"name": self.name, "kind": self.kind, "files": files}


def _sampled_digest(file: BinaryIO) -> str:
    """Returns the SHA-256 of evenly spaced pieces of a file, its beginning and its end among them."""
    digest, last = hashlib.sha256(), max(0, file.seek(0, 2) - _PIECE_BYTES)
    for i in range(_PIECES):
        file.seek(last * i // (_PIECES - 1))
        digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()


def open_model(spec: str | Path) -> OpenedModel:
    """Returns the model that `spec` names, its names and shapes checked, its tensors not yet read.

    Args:
      spec: a folder (compressed checkpoint or Hugging Face), a .gguf file, or a hub id ("owner/name"), which is
        downloaded or taken from the local cache.

    Raises:
      InputError: there is no such model, or it is broken, or it needs the extra `hf` (GGUF, hub ids); one line says it.
    """
    path = Path(spec)
    if path.is_file():
        if path.suffix != ".gguf" and not is_gguf(path):  # model stores keep them under other names
            raise InputError(f"{path} is a file but not GGUF; give a GGUF file, a folder or a hub id")
        return _open_gguf(path)
    if path.is_dir():
        return _open_folder(path, path.resolve().name)
    if _HUB_ID.fullmatch(str(spec)):
        return _open_folder(download(str(spec)), str(spec))
    raise InputError(f"model {str(spec)!r} is neither a folder, a .gguf file nor a hub id (owner/name)")


def _open_gguf(path: Path) -> OpenedModel:
    from cluscomp_jax.io.gguf.source import GgufSource  # here, because it needs the extra hf

    source = GgufSource(path)

    def load() -> Any:
        from cluscomp_jax.io.tokenizer.gguf import build_tokenizer

        return build_tokenizer(source.metadata, where=str(path))

    return OpenedModel("gguf", source.model_config, source.model, source, path.name, source.files, load)


def _open_folder(folder: Path, name: str) -> OpenedModel:
    if (folder / MANIFEST_NAME).is_file() or (folder / RUN_NAME).is_file():
        return _open_compressed(folder, name)
    if is_aqlm(folder):
        return open_aqlm(folder, name=name)
    if (folder / "config.json").is_file():
        return _open_hugging_face(folder, name)
    found = sorted(path.name for path in folder.glob("*.gguf"))
    hint = f"; name the file itself: {found[0]}" if found else ""
    raise InputError(f"{folder} has neither manifest.json (compressed) nor config.json (Hugging Face){hint}")


def _open_compressed(folder: Path, name: str) -> OpenedModel:
    source = open_checkpoint(folder)
    model = build_model(source.model_config)

    def load() -> Any:
        if source.tokenizer_path is None:
            raise InputError(f"{folder} carries no tokenizer; give tokens (.npy) instead of text")
        return load_tokenizer(source.tokenizer_path)

    def carried() -> Carried | None:
        return None if (path := source.carried_path()) is None else open_carried(path)

    return OpenedModel("compressed", source.model_config, model, source, name, (folder / MANIFEST_NAME,), load, carried)


def open_aqlm(folder: Path, *, name: str, allow_dense: bool = True) -> OpenedModel:
    """Returns the model of an AQLM folder; `allow_dense` as for AqlmSource.

    Raises:
      InputError: as AqlmSource.
    """
    source = AqlmSource(folder, allow_dense=allow_dense)
    load = functools.partial(load_tokenizer, folder)
    files = (folder / "config.json", *source.files)
    return OpenedModel("aqlm", source.model_config, source.model, source, name, files, load)


def _open_hugging_face(folder: Path, name: str) -> OpenedModel:
    config = read_config(folder)
    model = build_model(config)
    source = SafetensorsSource(folder, model, nesting_of(read_object(folder / "config.json")))
    load = functools.partial(load_tokenizer, folder)
    files = (folder / "config.json", *source.files)
    carried = carried_of(folder, source)
    return OpenedModel("hf", config, model, source, name, files, load, lambda: carried)
