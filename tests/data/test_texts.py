"""The shipped texts: there, whole, and attributed."""

import gzip
import json

import pytest

from cluscomp_jax import data
from cluscomp_jax.errors import InputError


@pytest.mark.parametrize(("name", "characters"), [("wiki_train", 2_002_219), ("wiki_test", 419_522)])
def test_text_is_whole(name: str, characters: int) -> None:
    text = data.text(name)
    assert len(text) == characters
    with gzip.open(data.path(name), "rt", encoding="utf-8", newline="") as stream:
        assert stream.read() == text


def test_every_article_is_attributed() -> None:
    articles = json.loads(data.text("wiki_attribution"))
    assert len(articles) == 90
    assert len({article["revision"] for article in articles}) == 90
    assert sum(article["split"] == "train" for article in articles) == 72
    assert all(article["title"] and article["revision"].isdigit() for article in articles)


def test_calibration_starts_are_64_distinct_positions_that_leave_512_tokens() -> None:
    starts = data.calibration_starts()
    assert len(set(starts)) == len(starts) == 64
    assert starts[0] == 71454
    assert min(starts) >= 0
    assert max(starts) + 512 <= 432_368


def test_unknown_name_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(InputError, match=r"'wiki_valid'.*wiki_train"):
        data.path("wiki_valid")
