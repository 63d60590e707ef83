"""What the tests share: the small trained Llama, and the shipped texts in its tokens. No test reaches the network."""

import gc
import os
import sys
from collections.abc import Generator, Iterator
from importlib import metadata
from pathlib import Path

import hypothesis
import numpy as np
import pytest

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
if not Path("/dev/nvidiactl").exists():  # what the extra `aot` installs would look for CUDA's libraries
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def compilation_cache() -> Path:
    """Returns the folder of compiled programs for these versions, this processor and this number of threads."""
    from cluscomp_jax.runtime.compiled_programs import programs_folder  # neither of the two imports JAX
    from cluscomp_jax.runtime.user_cache import user_cache

    packages = [f"{name} {metadata.version(name)}" for name in ("jax", "jaxlib", "flax", "optax")]
    return programs_folder(user_cache() / "cluscomp-jax-tests", sys.version, *packages, os.environ.get("XLA_FLAGS", ""))


# Most of a test's time is XLA's. Programs of several CPU devices are not cached, see tests/helpers/virtual_devices.py.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compilation_cache()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

RELEASE = (
    "checkpoint/", "cli/test_help", "clustering/", "core/", "inference/test_decoder", "io/", "kmeans/",
    "models/llama/test_flax", "models/llama/test_model", "pallas_kernels/", "plan/", "reporting/",
    "runtime/test_extras", "runtime/test_host_memory", "runtime/test_reporter", "scripts/test_check_card",
    "scripts/test_verify_kernels", "test_core_alone", "test_imports", "test_pipeline", "test_wheel", "test_x64",
    "text/", "training/", "tuning/",
)  # fmt: skip
"""Beginnings of the paths of test files that depend on the release of JAX and its neighbours."""

CHECKED = (
    "clustering/", "core/", "kmeans/test_code_index", "kmeans/test_fit", "kmeans/test_init", "kmeans/test_search",
    "kmeans/test_tree", "models/", "test_pipeline.py", "test_shapes", "tuning/",
)  # fmt: skip
"""Beginnings of the paths of test files in which NaN is looked for, where it is; the others are to follow."""
SELECTED = ("long", "slow", "parity", "gpu")
"""Markers of the tests that are not in the fast suite; they run without these checks of dtypes and NaN."""
LOOK_FOR_NANS = os.environ.get("CLUSCOMP_TEST_NANS") == "1"
"""JAX donates no argument while it looks for NaN, and compiles every program again; one of the gate's runs looks."""

# The same examples in every run, so that their programs are found compiled; make test-long draws others.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile("repeatable")

FIXTURES = Path(__file__).resolve().parent / "fixtures"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what `make test-oldest` runs."""
    for item in items:
        if item.path.relative_to(FIXTURES.parent).as_posix().startswith(RELEASE):
            item.add_marker(pytest.mark.release)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Runs a fast test, its fixtures and its processes with JAX's checks of dtypes and, if they are asked for, of NaN.

    No dtype is promoted implicitly. A program that returns NaN is an error unless the test has the marker `nans`.
    """
    if any(item.get_closest_marker(name) for name in SELECTED):
        return (yield)
    import jax

    path = item.path.relative_to(FIXTURES.parent).as_posix()
    nans = LOOK_FOR_NANS and path.startswith(CHECKED) and not item.get_closest_marker("nans")
    checks = {"jax_numpy_dtype_promotion": "strict", "jax_debug_nans": nans}
    before = {name: getattr(jax.config, name) for name in checks}
    with pytest.MonkeyPatch.context() as patch:
        try:
            for name, value in checks.items():
                patch.setenv(name.upper(), str(value))
                jax.config.update(name, value)
            return (yield)
        finally:
            for name, value in before.items():
                jax.config.update(name, value)


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs() -> Iterator[None]:
    """Frees the programs of a test file after it; those of all files would be gigabytes."""
    yield
    if jax := sys.modules.get("jax"):
        from cluscomp_jax.runtime.host_memory import return_freed_memory

        jax.clear_caches()
        gc.collect()
        return_freed_memory()


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The Hugging Face folder of a Llama of 2.4 million parameters that has learnt English; its context is 256."""
    return FIXTURES / "tiny_llama"


def _tokens(model: Path, name: str) -> np.ndarray:
    import tokenizers

    from cluscomp_jax import data

    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    tokens = np.asarray(tokenizer.encode(data.text(name)).ids, np.int32)
    tokens.setflags(write=False)
    return tokens


@pytest.fixture(scope="session")
def tiny_train_tokens(tiny_model: Path) -> np.ndarray:
    """The text that `tiny_model` was trained on, int32 [tokens], by its own tokenizer; read-only."""
    return _tokens(tiny_model, "wiki_train")


@pytest.fixture(scope="session")
def tiny_test_tokens(tiny_model: Path) -> np.ndarray:
    """The text that was held out from `tiny_model`, int32 [tokens], by its own tokenizer; read-only."""
    return _tokens(tiny_model, "wiki_test")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the fixtures and texts have the paths they have in a checkout, and that can be written to."""
    for place in ("tests/fixtures", "cluscomp_jax/data"):
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).symlink_to(FIXTURES.parent.parent / place)
    monkeypatch.chdir(tmp_path)
    return tmp_path
