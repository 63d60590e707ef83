"""Files to train on, through tokenizers of single characters: every token can be checked by eye."""

import dataclasses
import gzip
import json

import numpy as np
import pytest
from cli_models import CHARACTERS, write_tokenizer

from cluscomp_jax.config.data import DataConfig
from cluscomp_jax.errors import InputError
from cluscomp_jax.io.tokenizer import load_tokenizer
from cluscomp_jax.text.text import load_tokens
from cluscomp_jax.text.training_data import read_examples, read_questions

VOCAB = 2 + len(CHARACTERS)
# Roles are named by their first letters; a full stop ends what is said.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ' ' + m['content'] + '.' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"
)
RESPONSES = DataConfig(length=40, responses_only=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture
def chat(plain):
    plain.chat_template = TEMPLATE
    yield plain
    plain.chat_template = None


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def said(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def shown(tokens, tokenizer):
    return "".join("" if t == 0 else "$" if t == 1 else tokenizer.decode([t]) for t in tokens)


def test_running_text_is_cut_into_rows(plain, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghijk")
    examples = read_examples(path, plain, DataConfig(length=4), vocab_size=VOCAB)
    assert [shown(row, plain) for row in examples.tokens] == ["abcd", "efgh"]
    assert examples.loss_mask.all()
    assert examples.tokens.dtype == np.int32


@pytest.mark.parametrize("packed", [False, True])
def test_texts_follow_one_another_with_the_end_token_between(plain, tmp_path, packed):
    path = write(tmp_path / "a.jsonl", {"text": "abc", "id": 7}, "", {"text": "de"}, {"text": "fghi"})
    if packed:
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    examples = read_examples(path, plain, DataConfig(length=6), vocab_size=VOCAB)
    assert [shown(row, plain) for row in examples.tokens] == ["abc$de", "$fghi$"]


def test_only_what_the_assistant_says_is_scored(chat, tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        said(("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")),
        said(("system", "be"), ("assistant", "a")),
    )
    examples = read_examples(path, chat, RESPONSES, vocab_size=VOCAB)
    assert [shown(row, chat) for row in examples.tokens] == ["u hi.a yes.u so.a no.", "s be.a a."]
    loss_mask = [shown(row[counts], chat) for row, counts in zip(examples.tokens, examples.loss_mask, strict=True)]
    assert loss_mask == ["yes.no.", "a."]
    everything = read_examples(path, chat, DataConfig(length=40), vocab_size=VOCAB)
    np.testing.assert_array_equal(everything.tokens, examples.tokens)
    np.testing.assert_array_equal(everything.loss_mask.sum(axis=1), [21, 9])


def test_instructions_go_through_the_template_where_there_is_one(chat, tmp_path):
    fields = {"instruction": "add", "input": "b", "output": "c"}
    examples = read_examples(write(tmp_path / "a.jsonl", fields), chat, RESPONSES, vocab_size=VOCAB)
    assert shown(examples.tokens[0], chat) == "u add\n\nb.a c."
    assert shown(examples.tokens[0][examples.loss_mask[0]], chat) == "c."


def test_instructions_without_a_template_have_headings_and_an_end_token(plain, tmp_path):
    fields = [{"instruction": "add", "output": "c"}, {"instruction": "add", "input": "b", "output": "c"}]
    settings = DataConfig(length=80, responses_only=True)
    examples = read_examples(write(tmp_path / "a.jsonl", *fields), plain, settings, vocab_size=VOCAB)
    for row, counts in zip(examples.tokens, examples.loss_mask, strict=True):
        assert shown(row[counts], plain) == "c$"
    # "#", ":" and capitals are unknown to this tokenizer and shown as nothing.
    assert shown(examples.tokens[0], plain) == " nstruction\nadd\n\n esponse\nc$"
    assert shown(examples.tokens[1], plain) == " nstruction\nadd\n\n nput\nb\n\n esponse\nc$"


def test_what_becomes_of_a_conversation_that_is_too_long(chat, tmp_path):
    long, short = said(("user", "hi"), ("assistant", "abcdefgh")), said(("user", "hi"), ("assistant", "a"))
    path = write(tmp_path / "a.jsonl", short, long)
    with pytest.raises(InputError, match="line 2: has 16 tokens, a row 12"):
        read_examples(path, chat, DataConfig(length=12), vocab_size=VOCAB)
    cut = read_examples(path, chat, DataConfig(length=12, too_long="cut"), vocab_size=VOCAB)
    assert [shown(row, chat) for row in cut.tokens] == ["u hi.a a.", "u hi.a abcde"]
    skipped = read_examples(path, chat, DataConfig(length=12, too_long="skip"), vocab_size=VOCAB)
    assert [shown(row, chat) for row in skipped.tokens] == ["u hi.a a."]
    with pytest.raises(InputError, match="every conversation is longer than 6 tokens"):
        read_examples(path, chat, DataConfig(length=6, too_long="skip"), vocab_size=VOCAB)
    with pytest.raises(InputError, match="line 1: none of its first 6 tokens is a response"):
        read_examples(
            path, chat, DataConfig(length=6, too_long="cut", responses_only=True), vocab_size=VOCAB
        )  # fmt: skip


def test_of_several_forms_the_most_structured_is_read(chat, tmp_path):
    """Alpaca as it is published repeats each instruction as "text"."""
    asked = {"instruction": "add", "input": "", "output": "c", "text": "below is an instruction"}
    examples = read_examples(write(tmp_path / "a.jsonl", asked), chat, RESPONSES, vocab_size=VOCAB)
    assert shown(examples.tokens[0], chat) == "u add.a c."
    both = asked | said(("user", "hi"), ("assistant", "yes"))
    examples = read_examples(write(tmp_path / "b.jsonl", both), chat, RESPONSES, vocab_size=VOCAB)
    assert shown(examples.tokens[0], chat) == "u hi.a yes."


def test_what_becomes_of_an_unusable_line(chat, tmp_path):
    lines = [{"instruction": "add", "output": output} for output in ("c", "", "d", "")]
    path = write(tmp_path / "a.jsonl", *lines)
    with pytest.raises(InputError, match=r"line 2: 'instruction' or .* is empty; take the line out, or set unusable"):
        read_examples(path, chat, RESPONSES, vocab_size=VOCAB)
    rows = read_examples(path, chat, dataclasses.replace(RESPONSES, unusable="skip"), vocab_size=VOCAB)
    assert [shown(row, chat) for row in rows.tokens] == ["u add.a c.", "u add.a d."]
    assert (rows.lines.tolist(), rows.left_out.tolist()) == ([1, 3], [2, 4])
    with pytest.raises(InputError, match="every conversation is longer than 40 tokens, or unusable"):
        read_examples(
            write(tmp_path / "b.jsonl", lines[1]),
            chat,
            dataclasses.replace(RESPONSES, unusable="skip"),
            vocab_size=VOCAB,
        )


@pytest.mark.parametrize("setting", [{"too_long": "cut"}, {"unusable": "skip"}, {"responses_only": True}])
def test_settings_of_conversations_are_refused_for_running_text(plain, tmp_path, setting):
    (tmp_path / "a.txt").write_text("abcdefghijk")
    for path in (tmp_path / "a.txt", write(tmp_path / "a.jsonl", {"text": "abcdefghijk"})):
        with pytest.raises(InputError, match="is running text"):
            read_examples(path, plain, DataConfig(length=4, **setting), vocab_size=VOCAB)


def test_calibration_and_evaluation_read_json_lines_as_training_does(chat, tmp_path):
    texts = write(tmp_path / "a.jsonl", {"text": "abc"}, {"text": "de"})
    assert shown(load_tokens(texts, chat), chat) == "abc$de$"
    talks = write(tmp_path / "b.jsonl", said(("user", "hi"), ("assistant", "yes")), said(("system", "be")))
    assert shown(load_tokens(talks, chat), chat) == "u hi.a yes.s be."
    for name in ("a.json", "a.csv", "a.tsv.gz", "a.parquet"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(InputError, match=r"give .*JSON lines"):
            load_tokens(tmp_path / name, chat)


GOOD = {"text": "abcdefghijklmnop"}


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([], "holds no lines"),
        (["", " "], "holds no lines"),
        ([GOOD, "{'text'"], r"line 2: is not JSON: [^:]* \(column 2\)$"),
        ([GOOD, "3"], "line 2: is a int; it must be an object"),
        ([GOOD, {"txt": "a"}], "line 2: has the keys txt; it must have one of"),
        ([{"id": 1}], "line 1: has the keys id; it must have one of"),
        ([GOOD, {"messages": []}], "line 2: holds 'messages', the first line 'text'"),
        ([GOOD, {"text": 3}], "line 2: 'text' is a int"),
        ([GOOD, '{"text": "a\\ud800"}'], "line 2: holds half a surrogate pair"),
        ([{"text": "a"}], "has 2 tokens, one row takes 8"),
        ([{"messages": []}], "line 1: 'messages' must be a list of at least one"),
        ([{"messages": [{"role": "user"}]}], "line 1: message 1 must be an object with the strings"),
        ([said(("user", "a"))], "holds messages, but the model's tokenizer has no chat template"),
        ([{"instruction": "", "output": "a"}], "line 1: 'instruction' or 'output' is empty"),
    ],
)
def test_a_broken_file_is_refused_by_the_number_of_the_line(plain, tmp_path, lines, text):
    with pytest.raises(InputError, match=text):
        read_examples(write(tmp_path / "a.jsonl", *lines), plain, DataConfig(length=8), vocab_size=VOCAB)


def test_half_a_character_in_a_message_is_refused_by_the_number_of_the_line(chat, tmp_path):
    path = write(tmp_path / "a.jsonl", said(("user", "hi"), ("assistant", "a")), said(("user", "\ud800")))
    with pytest.raises(InputError, match="line 2: holds half a surrogate pair"):
        read_examples(path, chat, DataConfig(length=40), vocab_size=VOCAB)


def test_what_is_json_or_a_table_by_its_name_is_not_trained_on_as_text(plain, tmp_path):
    for name in ("a.json", "a.JSON", "a.json.gz"):
        (tmp_path / name).write_text('[{"instruction": "a", "output": "b"}]' * 9)
        with pytest.raises(InputError, match=r"is JSON; give JSON lines \(.jsonl\)"):
            read_examples(tmp_path / name, plain, DataConfig(length=8), vocab_size=VOCAB)
    for name in ("a.csv", "a.TSV.gz", "a.parquet"):
        (tmp_path / name).write_text("instruction,output\n" * 9)
        with pytest.raises(InputError, match="is a table; give text"):
            read_examples(tmp_path / name, plain, DataConfig(length=8), vocab_size=VOCAB)
    lines = {name: write(tmp_path / name, {"text": "abcdefgh" * 4}) for name in ("a.jsonl", "A.JSONL")}
    read = [read_examples(path, plain, DataConfig(length=8), vocab_size=VOCAB) for path in lines.values()]
    np.testing.assert_array_equal(read[0].tokens, read[1].tokens)


def test_rows_know_the_lines_they_come_from(chat, tmp_path):
    short, long = said(("user", "hi"), ("assistant", "ho")), said(("user", "h" * 99), ("assistant", "ho"))
    path = write(tmp_path / "said.jsonl", "", short, long, "", short)
    examples = read_examples(path, chat, DataConfig(length=40, too_long="skip"), vocab_size=VOCAB)
    assert examples.lines.tolist() == [2, 5]
    path = write(tmp_path / "text.jsonl", {"text": "abcdefgh"})
    assert read_examples(path, chat, DataConfig(length=4), vocab_size=VOCAB).lines is None


def test_conversations_with_nothing_to_score_are_refused(chat, tmp_path):
    path = write(tmp_path / "a.jsonl", said(("user", "hi"), ("assistant", "a")), said(("user", "hi")))
    with pytest.raises(InputError, match="line 2: none of its first 40 tokens is a response"):
        read_examples(path, chat, RESPONSES, vocab_size=VOCAB)
    path = write(tmp_path / "a.jsonl", said(("assistant", "a")))
    with pytest.raises(InputError, match="line 1: begins with the assistant"):
        read_examples(path, chat, RESPONSES, vocab_size=VOCAB)


def test_a_template_that_rewrites_what_was_said_is_refused(chat, tmp_path):
    chat.chat_template = "{% for m in messages %}{{ m['content'] if loop.last else 'x' }}{% endfor %}"
    path = write(tmp_path / "a.jsonl", said(("user", "hi"), ("assistant", "a"), ("user", "b")))
    with pytest.raises(InputError, match="line 1: the chat template writes message 2 differently"):
        read_examples(path, chat, RESPONSES, vocab_size=VOCAB)


def test_a_template_that_refuses_is_named(chat, tmp_path):
    chat.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = write(tmp_path / "a.jsonl", said(("user", "hi")))
    with pytest.raises(InputError, match="line 1: the chat template refuses these messages: roles must alternate"):
        read_examples(path, chat, DataConfig(length=8), vocab_size=VOCAB)


def test_running_text_has_no_responses(plain, tmp_path):
    for path in (write(tmp_path / "a.jsonl", GOOD), write(tmp_path / "a.txt", "abc" * 40)):
        with pytest.raises(InputError, match="running text, which has no responses"):
            read_examples(path, plain, RESPONSES, vocab_size=VOCAB)


def test_a_tokenizer_of_another_model_is_refused(plain, tmp_path):
    for path in (write(tmp_path / "a.jsonl", GOOD), write(tmp_path / "a.txt", "abcdefgh")):
        with pytest.raises(InputError, match="the vocabulary has 4"):
            read_examples(path, plain, DataConfig(length=8), vocab_size=4)


def test_a_file_that_cannot_be_read_is_named(plain, tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_examples(tmp_path / "none.jsonl", plain, DataConfig(), vocab_size=VOCAB)
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match="cannot be read"):
        read_examples(tmp_path / "a.jsonl.gz", plain, DataConfig(), vocab_size=VOCAB)


def test_a_question_is_a_conversation_up_to_its_last_answer(chat, tmp_path):
    path = write(tmp_path / "q.jsonl", said(("user", "b"), ("assistant", "c"), ("user", "d"), ("assistant", "ef")))
    (question,) = read_questions(path, chat, vocab_size=VOCAB)
    assert shown(question.prompt, chat) == "u b.a c.u d.a "
    assert question.answer == "ef"
    path = write(tmp_path / "i.jsonl", {"instruction": "b", "input": "c", "output": "d"})
    (question,) = read_questions(path, chat, vocab_size=VOCAB)
    assert shown(question.prompt, chat) == "u b\n\nc.a "


def test_a_conversation_that_ends_with_a_question_has_no_answer(chat, tmp_path):
    path = write(tmp_path / "q.jsonl", said(("user", "b"), ("assistant", "c"), ("user", "d")))
    with pytest.raises(InputError, match="ends with 'user'"):
        read_questions(path, chat, vocab_size=VOCAB)


def test_a_conversation_without_an_answer_is_no_question(chat, tmp_path):
    path = write(tmp_path / "q.jsonl", said(("user", "b")))
    with pytest.raises(InputError, match="ends with 'user'"):
        read_questions(path, chat, vocab_size=VOCAB)
