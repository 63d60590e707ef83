"""A command on a machine without a GPU says nothing of CUDA."""

from pathlib import Path

import pytest

from cluscomp_jax.runtime import platform


@pytest.mark.parametrize(
    ("chosen", "device", "plugin", "skips"),
    [
        (None, False, True, True),
        (None, False, False, False),
        (None, True, True, False),
        ("cuda", False, True, False),
        ("", False, True, False),
    ],
)
def test_the_cpu_alone_starts_where_there_is_a_plugin_and_no_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, chosen: str | None, device: bool, plugin: bool, skips: bool
) -> None:
    monkeypatch.delenv("JAX_PLATFORM_NAME", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("JAX_PLATFORMS", chosen)
    (tmp_path / "nvidiactl").touch() if device else None
    monkeypatch.setattr(platform, "_DEVICES", (tmp_path / "nvidiactl",))
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: object() if plugin and name.startswith("jax_cuda") else None
    )
    assert platform.skip_absent_gpu() is skips
    assert (platform.os.environ.get("JAX_PLATFORMS") == "cpu") is skips
