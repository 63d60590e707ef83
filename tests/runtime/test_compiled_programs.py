"""Commands keep what they compile, unless the user has decided on JAX's cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluscomp_jax.runtime import compiled_programs
from cluscomp_jax.runtime.compiled_programs import keep_compiled_programs, programs_folder


@pytest.fixture(autouse=True)
def undecided(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT", "JAX_ENABLE_C"))]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled_programs.os, "environ", dict(os.environ))  # what is set here reaches no other test


def test_programs_are_kept_in_the_cache_of_the_user(tmp_path: Path) -> None:
    assert keep_compiled_programs()
    folder = Path(compiled_programs.os.environ["JAX_COMPILATION_CACHE_DIR"])
    assert folder == programs_folder(tmp_path / "cluscomp-jax" / "programs")
    assert int(compiled_programs.os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"]) == 2 * 2**30


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_COMPILATION_CACHE_DIR", "/mine"),
        ("JAX_ENABLE_COMPILATION_CACHE", "false"),
        ("JAX_NUM_CPU_DEVICES", "2"),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=2"),
    ],
)
def test_what_the_user_decided_stays(name: str, value: str) -> None:
    compiled_programs.os.environ[name] = value
    before = dict(compiled_programs.os.environ)
    assert not keep_compiled_programs()
    assert compiled_programs.os.environ == before


def test_without_the_package_that_bounds_the_folder_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not keep_compiled_programs()


def test_another_number_of_threads_has_another_folder(tmp_path: Path) -> None:
    before = programs_folder(tmp_path)
    compiled_programs.os.environ["NPROC"] = "64"
    assert programs_folder(tmp_path) != before


@pytest.mark.long
def test_the_second_command_reads_what_the_first_compiled(tmp_path: Path) -> None:
    program = (
        "from cluscomp_jax.runtime.compiled_programs import keep_compiled_programs; assert keep_compiled_programs()\n"
        "import jax, jax.numpy as jnp\n"
        "hits = []; jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))\n"
        "solve = jax.jit(lambda a: jnp.linalg.svd(a @ jnp.linalg.inv(a.T + 3))[0].sum())\n"
        "print(float(solve(jnp.eye(9))), sum('cache_hits' in name for name in hits))"
    )
    environment = {**compiled_programs.os.environ, "JAX_PLATFORMS": "cpu"}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    runs = [
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    (first, none), (second, found) = (run.stdout.split() for run in runs)
    assert first == second
    assert none == "0"
    assert int(found) > 0
