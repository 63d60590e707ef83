"""`scripts/resolve_next_to.py` without a package index: what it makes of a resolver's answers."""

import pytest
from script_modules import load_script

script = load_script("resolve_next_to")

NO_SOLUTION = """error: No solution found when resolving dependencies
  cause: Because ejkernel==0.0.78 depends on jax>=0.9.0,<0.10.dev0 and easydel>=0.3.0 depends on ejkernel==0.0.78, we can conclude that easydel>=0.3.0 depends on jax>=0.9.0,<0.10.dev0.
         And because cluscomp-jax==0.1.0 depends on jax>=0.10.2,<0.13 and only cluscomp-jax==0.1.0 is available, we can conclude that all versions of cluscomp-jax and easydel>=0.3.0 are incompatible.
         And because you require easydel==0.3.0 and cluscomp-jax, we can conclude that your requirements are unsatisfiable.
"""  # noqa: E501
NO_PYTHON = """error: No solution found when resolving dependencies
  cause: Because the requested Python version (>=3.11) does not satisfy Python>=3.12 and all versions of maxtext depend on Python>=3.12, we can conclude that all versions of maxtext cannot be used.
"""  # noqa: E501
OTHERS = """error: No solution found
  cause: Because a==1 depends on b[x]>=2 and c==1 depends on b[x]<2, we can conclude that both are incompatible.
"""


def test_a_listing_gives_versions() -> None:
    listing = "# by a resolver\njax==0.12.0\nml_dtypes==0.6.0 ; sys_platform == 'linux'\ncluscomp-jax @ file:///x\n"
    assert script.pinned(listing) == {"jax": "0.12.0", "ml-dtypes": "0.6.0", "cluscomp-jax": ""}


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (NO_SOLUTION, "jax: ejkernel==0.0.78 needs >=0.9.0,<0.10.dev0, cluscomp-jax==0.1.0 needs >=0.10.2,<0.13"),
        (
            NO_PYTHON,
            "Because the requested Python version (>=3.11) does not satisfy Python>=3.12 and all versions of maxtext "
            "depend on Python>=3.12",
        ),
        (OTHERS, "b: a==1 needs >=2, c==1 needs <2"),
        ("error: no network", "error: no network"),
    ],
    ids=["ours", "python", "others", "another error"],
)
def test_a_clash_is_one_line(message: str, line: str) -> None:
    assert script.clash(message) == line


def test_the_line_of_a_package() -> None:
    alone = script.Resolution({"keras-hub": "1.2", "numpy": "2.0"})
    together = script.Resolution({"keras-hub": "1.2", "numpy": "2.0", "jax": "0.12.0", "cluscomp-jax": ""})
    assert script.next_to("keras_hub", alone, together) == (
        "keras_hub 1.2: 4 packages (2 without this project; jax 0.12.0)"
    )
    refused = script.Resolution({}, OTHERS)
    assert script.next_to("keras-hub", alone, refused) == (
        "keras-hub 1.2: does not resolve; b: a==1 needs >=2, c==1 needs <2"
    )
    assert script.next_to("keras-hub", refused, refused) == (
        "keras-hub: does not resolve by itself; b: a==1 needs >=2, c==1 needs <2"
    )


def test_a_package_with_extras_is_found_by_its_name() -> None:
    alone = script.Resolution({"maxtext": "0.2.5"})
    assert script.next_to("maxtext[cuda12]", alone, alone).startswith("maxtext[cuda12] 0.2.5: 1 packages")
