"""Makes instruction data out of the shipped Wikipedia text: JSON lines to train on and others to test on.

    python scripts/make_instructions.py --out data

Writes DATA/sentences-{train,test}.jsonl, four kinds of exercise on single sentences, and DATA/years-{train,test}.jsonl,
questions whose answers end in "#### YEAR". Train comes of wiki_train, test of wiki_test: no sentence is in both.
"""

import argparse
import gzip
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from cluscomp_jax import data

Line = dict[str, str]
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
YEAR = re.compile(r"\b1[0-9]{3}\b|\b20[0-2][0-9]\b")


def sentences(text: str) -> Iterator[str]:
    """Yields the sentences of 8 to 30 words, in order, each once."""
    seen = set()
    for paragraph in text.split("\n"):
        for sentence in SENTENCE.split(paragraph.strip()):
            if 8 <= len(sentence.split()) <= 30 and sentence not in seen:
                seen.add(sentence)
                yield sentence


def finish(sentence: str, rng: random.Random) -> Line:
    words = sentence.split()
    cut = len(words) // 2
    return {"instruction": "Finish this sentence.", "input": " ".join(words[:cut]), "output": " ".join(words[cut:])}


def sort_words(sentence: str, rng: random.Random) -> Line:
    words = sentence.split()
    mixed = rng.sample(words, len(words))
    return {"instruction": "Put these words in order.", "input": " ".join(mixed), "output": sentence}


def fill_gap(sentence: str, rng: random.Random) -> Line:
    words = sentence.split()
    gap = rng.randrange(1, len(words) - 1)
    shown = " ".join([*words[:gap], "_", *words[gap + 1 :]])
    return {"instruction": "Which word is missing?", "input": shown, "output": words[gap]}


def repair_spelling(sentence: str, rng: random.Random) -> Line:
    words = sentence.split()
    places = [i for i, word in enumerate(words) if len(word) > 3] or [0]
    for place in rng.sample(places, min(3, len(places))):
        at = rng.randrange(len(words[place]) - 1) if len(words[place]) > 1 else 0
        word = words[place]
        words[place] = word[:at] + word[at + 1 : at + 2] + word[at : at + 1] + word[at + 2 :]
    return {"instruction": "Correct the spelling.", "input": " ".join(words), "output": sentence}


EXERCISES: tuple[Callable[[str, random.Random], Line], ...] = (finish, sort_words, fill_gap, repair_spelling)


def exercises(text: str, seed: int) -> list[Line]:
    """Returns one exercise on every sentence, the four kinds in turn, shuffled."""
    rng = random.Random(seed)
    lines = [EXERCISES[i % len(EXERCISES)](sentence, rng) for i, sentence in enumerate(sentences(text))]
    rng.shuffle(lines)
    return lines


def years(text: str, seed: int) -> list[Line]:
    """Returns a question on every sentence that names exactly one year, shuffled."""
    lines = []
    for sentence in sentences(text):
        found = YEAR.findall(sentence)
        if len(found) == 1:
            answer = f"The sentence names the year {found[0]}.\n#### {found[0]}"
            lines.append({"question": f"Which year does this sentence name?\n{sentence}", "answer": answer})
    random.Random(seed).shuffle(lines)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder, made if absent")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        text = gzip.decompress(data.path(f"wiki_{split}").read_bytes()).decode("utf-8")
        for name, made in (("sentences", exercises(text, options.seed)), ("years", years(text, options.seed))):
            path = options.out / f"{name}-{split}.jsonl"
            path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in made), encoding="utf-8")
            print(f"{path}: {len(made)} lines")


if __name__ == "__main__":
    main()
