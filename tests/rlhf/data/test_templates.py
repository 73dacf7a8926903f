"""Prompted tasks: what templates make of examples, caps, YAML files, and what is wrong with them."""

import pytest

from effscale.data import BLOOM_TOKENS, train_tokenizer
from effscale.rlhf.data import RecordEncoder, fine_tuning_rows, read_tasks
from effscale.rlhf.data.templates import PromptedTask, PromptTemplate, PromptTemplateError

NLI = """
task: nli
templates:
  - name: does it follow
    input: "{premise}\\nDoes it follow that {hypothesis}?"
    target: "{label}"
    choices: ["yes", "no", "maybe"]
  - name: given
    input: "Given that {premise}, {hypothesis}. {{True}}?"
    target: "{label}"
    choices: "{options}"
"""
EXAMPLE = {
    "premise": "it rains {hard}",
    "hypothesis": "the street is wet",
    "label": "yes",
    "options": ["yes", "no"],
}


@pytest.fixture
def task(tmp_path):
    (tmp_path / "nli.yaml").write_text(NLI)
    (task,) = read_tasks(tmp_path)
    return task


def test_texts_are_filled_and_never_run(task):
    one, two = (task.templates[i].apply(EXAMPLE) for i in (0, 1))
    assert one.prompt == "it rains {hard}\nDoes it follow that the street is wet?"
    assert (one.target, one.choices, one.answer) == ("yes", ("yes", "no", "maybe"), 0)
    assert two.prompt == "Given that it rains {hard}, the street is wet. {True}?"
    assert two.answers == [" yes", " no"]


def test_the_target_follows_a_space_and_alone_is_learned(task):
    tokenizer = train_tokenizer(
        ["yes no wet street"], vocab_size=270, special_tokens=BLOOM_TOKENS, splitting="bloom"
    )
    record = task.templates[0].apply(EXAMPLE).record()
    encoder = RecordEncoder(tokenizer=tokenizer)
    rows = fine_tuning_rows([record], encoder, length=128, weigh="record")
    learned = rows["loss_weights"][0] > 0
    said = tokenizer.decode(rows["labels"][0][learned].tolist(), skip_special_tokens=False)
    assert said == " yes</s>"
    assert rows["loss_weights"].sum() == pytest.approx(1)


def test_each_template_draws_its_own_examples_up_to_the_cap(task):
    examples = [{**EXAMPLE, "premise": str(i)} for i in range(50)]
    made = task.prompted(examples, cap=10, seed=1)
    drawn = [[prompted.prompt for prompted in each] for each in made.values()]
    numbers = [{"".join(filter(str.isdigit, prompt)) for prompt in each} for each in drawn]
    assert [len(each) for each in numbers] == [10, 10]
    assert numbers[0] != numbers[1]
    again = task.prompted(examples, cap=10, seed=1)
    assert again == made
    assert len(task.prompted(examples)["given"]) == 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"premise": None}, "no field 'premise'; its fields are 'hypothesis', 'label', 'options'"),
        ({"label": "never"}, "the target must be one of the choices .* got 'never'"),
        ({"label": " "}, "the target is empty"),
    ],
)
def test_examples_that_do_not_fit(task, change, message):
    example = {name: value for name, value in {**EXAMPLE, **change}.items() if value is not None}
    with pytest.raises(PromptTemplateError, match=message):
        task.templates[0].apply(example)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (None, "must be a list of choices, got None"),
        ("yes", "must be a list of choices, got 'yes'"),
        (["yes"], "at least two different ones"),
        (["yes", "yes"], "at least two different ones"),
    ],
)
def test_choices_that_are_none(task, options, message):
    with pytest.raises(PromptTemplateError, match=message):
        task.templates[1].apply({**EXAMPLE, "options": options})


@pytest.mark.parametrize("choices", ["{a} {b}", "The {a}.", "a", "{a!r}"])
def test_choices_from_a_field_are_that_field_alone(choices):
    with pytest.raises(PromptTemplateError, match=r"choices|brace"):
        PromptTemplate(name="x", input="{text}", target="{label}", choices=choices)


@pytest.mark.parametrize(
    "text", ["{premise.__class__}", "{premise[0]}", "{premise!r}", "{premise:>9}", "{}", "{premise"]
)
def test_braces_hold_names_only(text):
    with pytest.raises(PromptTemplateError, match="brace"):
        PromptTemplate(name="x", input=text, target="{label}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [", "not YAML"),
        ("- a", "must be a mapping"),
        ("task: nli", "'templates' is missing"),
        ("task: nli\ntemplates: []", "templates must be at least one"),
        (NLI.replace("target:", "targets:"), "'targets'.*'target'"),
        (NLI.replace('"yes", "no", "maybe"', "yes, no"), "quotation marks"),
        (NLI.replace("name: given", "name: does it follow"), "distinct names"),
        (NLI.replace("{hypothesis}?", "{hypothesis!s}?"), "template 1.*hypothesis"),
    ],
)
def test_files_that_are_no_tasks(tmp_path, text, message):
    file = tmp_path / "task.yaml"
    file.write_text(text)
    with pytest.raises(PromptTemplateError, match=message):
        read_tasks(file)


def test_a_folder_without_tasks(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no \*\.yaml file"):
        read_tasks(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing: no such file"):
        read_tasks(tmp_path / "nothing")


def test_a_cap_below_one(task):
    with pytest.raises(ValueError, match="cap must be at least 1, or None, got 0"):
        task.prompted([EXAMPLE], cap=0)


def test_a_task_needs_templates():
    with pytest.raises(PromptTemplateError, match="'empty'"):
        PromptedTask(name="empty", templates=())
