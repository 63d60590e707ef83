"""Local tasks for the lm-evaluation-harness, made from the shipped test text: `make_lm_eval_tasks.py FOLDER`.

Three tasks of 200 documents each, the same whenever it is run:

    wiki_next_words     the next ten words of a paragraph, among the ones of three other articles' paragraphs
    wiki_next_sentence  the next sentence, among three other sentences of the same article
    wiki_last_word      the last word of a passage, by greedy decoding

FOLDER is then what --include_path takes. The standard library alone.
"""

import argparse
import json
import random
import re
from pathlib import Path

from cluscomp_jax import data

DOCUMENTS, CHOICES = 200, 4
CONTEXT_WORDS, NEXT_WORDS = 40, 10

MULTIPLE_CHOICE = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
LAST_WORD = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{target}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
metadata:
  version: 1.0
"""


def sentences_of(paragraph: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph) if len(part.split()) >= 6]


def next_words(paragraphs: list[str], rng: random.Random) -> list[dict[str, object]]:
    long = [p.split() for p in paragraphs if len(p.split()) >= CONTEXT_WORDS + NEXT_WORDS + 20]
    documents: list[dict[str, object]] = []
    while len(documents) < DOCUMENTS:
        words = rng.choice(long)
        at = rng.randrange(CONTEXT_WORDS, len(words) - NEXT_WORDS + 1)
        true = " ".join(words[at : at + NEXT_WORDS])
        others = []
        for other in rng.sample([w for w in long if w is not words], CHOICES - 1):
            begin = rng.randrange(0, len(other) - NEXT_WORDS + 1)
            others.append(" ".join(other[begin : begin + NEXT_WORDS]))
        documents.append(multiple_choice(" ".join(words[at - CONTEXT_WORDS : at]), true, others, rng))
    return documents


def next_sentence(paragraphs: list[str], rng: random.Random) -> list[dict[str, object]]:
    cut = [sentences for p in paragraphs if len(sentences := sentences_of(p)) >= 3]
    documents: list[dict[str, object]] = []
    while len(documents) < DOCUMENTS:
        place = rng.randrange(len(cut))
        at = rng.randrange(2, len(cut[place]))
        near = [s for sentences in cut[max(0, place - 6) : place + 7] for s in sentences]
        pool = [s for s in near if s not in cut[place]]
        if len(pool) >= CHOICES - 1:
            others = rng.sample(pool, CHOICES - 1)
            documents.append(multiple_choice(" ".join(cut[place][at - 2 : at]), cut[place][at], others, rng))
    return documents


def multiple_choice(context: str, true: str, others: list[str], rng: random.Random) -> dict[str, object]:
    choices = [true, *others]
    rng.shuffle(choices)
    return {"context": context, "choices": choices, "label": choices.index(true)}


def last_word(paragraphs: list[str], rng: random.Random) -> list[dict[str, object]]:
    documents: list[dict[str, object]] = []
    long = [p.split() for p in paragraphs if len(p.split()) >= CONTEXT_WORDS + 2]
    while len(documents) < DOCUMENTS:
        words = rng.choice(long)
        at = rng.randrange(CONTEXT_WORDS, len(words))
        if words[at].isalpha() and words[at].islower() and len(words[at]) >= 3:
            documents.append({"context": " ".join(words[at - CONTEXT_WORDS : at]), "target": f" {words[at]}"})
    return documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="made if it is not there")
    folder = parser.parse_args().folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    paragraphs = [p for p in data.text("wiki_test").split("\n\n") if p.strip()]
    for name, make, template in (
        ("wiki_next_words", next_words, MULTIPLE_CHOICE),
        ("wiki_next_sentence", next_sentence, MULTIPLE_CHOICE),
        ("wiki_last_word", last_word, LAST_WORD),
    ):
        documents = make(paragraphs, random.Random(name))
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(template.format(name=name, file=json.dumps(str(file))), encoding="utf-8")


if __name__ == "__main__":
    main()
