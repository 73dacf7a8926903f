"""Rows of public data sets, as their cards show them, become the records that were meant."""

import pytest

from effscale.rlhf.data import Message, Record, RecordError, named_fields
from effscale.rlhf.data.chat.plain import PLAIN_FORMATS
from effscale.rlhf.data.dialogue import parse_dialogue
from effscale.rlhf.data.formats import FORMATS, detect_format

USER = lambda text: Message("user", text)
BOT = lambda text: Message("assistant", text)
HH = "\n\nHuman: How?\n\nAssistant: So: one\n\ntwo.\n\nHuman: And then?\n\nAssistant:"
ROLES = lambda *texts: [
    {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
]
TURNS = lambda *texts: [
    {"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)
]

# The format, a row, and its record as prompt, chosen, rejected.
ROWS = [
    (
        "hh_rlhf",
        {"chosen": HH + " Good.", "rejected": HH + " Go away."},
        ([USER("How?"), BOT("So: one\n\ntwo."), USER("And then?")], "Good.", "Go away."),
    ),
    # Common beginnings of the responses are not taken for the prompt's.
    (
        "hh_rlhf",
        {"chosen": HH + " I'd go", "rejected": HH + " I'd rather not"},
        ([USER("How?"), BOT("So: one\n\ntwo."), USER("And then?")], "I'd go", "I'd rather not"),
    ),
    (
        "rm_static",
        {"prompt": HH, "response": " x", "chosen": " Good.", "rejected": " Bad."},
        ([USER("How?"), BOT("So: one\n\ntwo."), USER("And then?")], "Good.", "Bad."),
    ),
    ("dpo", {"prompt": "Q: ", "chosen": " a", "rejected": "b"}, ("Q: ", " a", "b")),
    (
        "dpo",
        {"prompt": ROLES("Q"), "chosen": ROLES("Q", "a")[1:], "rejected": ROLES("Q", "b")[1:]},
        ([USER("Q")], "a", "b"),
    ),
    # UltraFeedback repeats the prompt as a text beside the messages.
    (
        "dpo",
        {"prompt": "Q", "chosen": ROLES("Q", "a"), "rejected": ROLES("Q", "b")},
        ([USER("Q")], "a", "b"),
    ),
    (
        "dpo",
        {"chosen": ROLES("P", "p", "Q", "a"), "rejected": ROLES("P", "p", "Q", "b")},
        ([USER("P"), BOT("p"), USER("Q")], "a", "b"),
    ),
    (
        "alpaca",
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        ([USER("Add.\n\n1 2")], "3", None),
    ),
    ("alpaca", {"instruction": "Hi", "input": "", "output": "Yo"}, ([USER("Hi")], "Yo", None)),
    (
        "alpaca",
        {"instruction": "Q", "system": "S", "history": [["a", "b"]], "chosen": "x", "rejected": "y"},
        ([Message("system", "S"), USER("a"), BOT("b"), USER("Q")], "x", "y"),
    ),
    (
        "sharegpt",
        {"conversations": TURNS("a", "b", "c", "d", "left open"), "system": "S"},
        ([Message("system", "S"), USER("a"), BOT("b"), USER("c")], "d", None),
    ),
    (
        "sharegpt",
        {
            "conversations": TURNS("a"),
            "chosen": {"from": "gpt", "value": "x"},
            "rejected": {"from": "gpt", "value": "y"},
        },
        ([USER("a")], "x", "y"),
    ),
    ("messages", {"messages": ROLES("a", "b")}, ([USER("a")], "b", None)),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}], "tool_calls": None}, *ROLES("", "b")[1:]]}, ([USER("a")], "b", None)),
    (
        "webgpt",
        {
            "question": {"dataset": "eli5", "full_text": "Why?"},
            "answer_0": "So [1], and (see f(x)) so [2, 3].",
            "answer_1": "No [1].",
            "score_0": -0.5,
            "score_1": 0.5,
        },
        ([USER("Why?")], "No.", "So, and (see f(x)) so."),
    ),
    (
        "shp",
        {"history": "Post", "human_ref_A": "a", "human_ref_B": "b", "labels": 0, "score_A": 9},
        ([USER("Post")], "b", "a"),
    ),
    ("shp", {"history": "Post", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}, ([USER("Post")], "a", "b")),
    ("instruction", {"prompt": "Q", "completion": "a"}, ("Q", "a", None)),
    ("instruction", {"prompt": ROLES("Q")}, ([USER("Q")], None, None)),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(ROWS)), ids=[name for name, _, _ in ROWS])
def test_a_row_is_told_by_its_fields_and_converted(number):
    name, row, (prompt, chosen, rejected) = ROWS[number]
    assert detect_format(row) == name
    assert FORMATS[name](row) == Record(prompt=prompt, chosen=chosen, rejected=rejected)


def test_every_format_is_in_the_table_above():
    assert {name for name, _, _ in ROWS} == set(FORMATS)


def test_rm_static_is_given_back_by_its_format():
    row = {"prompt": HH, "chosen": " Good.", "rejected": " Bad."}
    record = FORMATS["rm_static"](row)
    form = PLAIN_FORMATS["hh_rlhf"]
    assert form.prompt(record.messages) == HH
    assert form.answer(record.messages, record.chosen) == " Good."


def test_an_unknown_format_lists_what_was_found():
    with pytest.raises(
        RecordError, match=r"the fields 'question', 'best' .*hh_rlhf: chosen.*named_fields"
    ):
        detect_format({"question": "Q", "best": "A"})


@pytest.mark.parametrize(
    ("convert", "row", "message"),
    [
        ("hh_rlhf", {"chosen": HH}, r"no field 'rejected'; the fields are 'chosen'"),
        ("hh_rlhf", {"chosen": "Hello", "rejected": "Hello"}, "no common turn 'Assistant:'"),
        ("hh_rlhf", {"chosen": HH + " a\n\nHuman: b\n\nAssistant: c", "rejected": HH + " d"}, "differ before their last turn"),
        ("rm_static", {"prompt": "Q", "chosen": "a", "rejected": "b"}, "must begin with 'Human:' .* got 'Q'"),
        ("dpo", {"prompt": "Q", "chosen": 3, "rejected": "b"}, "field 'chosen' must be a list of messages, got a value of type int"),
        ("dpo", {"prompt": None, "chosen": "a", "rejected": "b"}, "field 'prompt' must be a list of messages, got null"),
        ("dpo", {"chosen": ROLES("Q", "a"), "rejected": ROLES("P", "b")}, "differ before their last message"),
        ("dpo", {"prompt": "Q", "chosen": ROLES("a"), "rejected": ROLES("b")}, "'chosen' must have the role 'assistant', got 'user'"),
        ("dpo", {"prompt": "Q\ud800", "chosen": "a", "rejected": "b"}, "field 'prompt' contains a lone surrogate"),
        ("alpaca", {"instruction": "Q", "history": ["ab"], "output": "x"}, "'history' must be a list of pairs"),
        ("sharegpt", {"conversations": [{"from": "cat", "value": "x"}]}, r"conversations\[0\].from must be one of .* got 'cat'"),
        ("sharegpt", {"conversations": [{"value": "x"}]}, r"conversations\[0\] has no 'from'; its keys are 'value'"),
        ("sharegpt", {"conversations": TURNS("a")}, "no answer of the assistant"),
        ("messages", {"messages": []}, "'messages' has no message"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "parts that are not text"),
        ("messages", {"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "calls tools"),
        ("webgpt", {"question": "Q", "answer_0": "a", "answer_1": "b", "score_0": 0.0, "score_1": 0}, "both answers have the score 0"),
        ("webgpt", {"question": "Q", "answer_0": "a", "answer_1": "b", "score_0": "high", "score_1": 0}, "'score_0' must be a number, got 'high'"),
        ("shp", {"history": "P", "human_ref_A": "a", "human_ref_B": "b", "labels": 2}, "'labels' must be 0 or 1, got 2"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_says_why(convert, row, message):
    with pytest.raises(RecordError, match=message):
        FORMATS[convert](row)


def test_fields_of_ones_own():
    convert = named_fields(prompt="q", chosen="good", rejected="bad")
    assert convert({"q": "Q", "good": "a", "bad": "b"}) == Record(
        prompt="Q", chosen="a", rejected="b"
    )
    with pytest.raises(RecordError, match="no field 'bad'; the fields are 'q', 'good'"):
        convert({"q": "Q", "good": "a"})
    with pytest.raises(ValueError, match="rejected must be None if chosen is None, got 'bad'"):
        named_fields(prompt="q", rejected="bad")


def test_dialogues():
    # A word within a turn begins none, and DeepSpeed-Chat's own format has spaces only at its beginning.
    assert parse_dialogue(" Human: The Human: is late") == (USER("The Human: is late"),)
    assert parse_dialogue("Human: a\n\nAssistant: b") == (USER("a"), BOT("b"))
    assert parse_dialogue("\n\nAssistant:") == (BOT(""),)
