"""Prompted tasks: templates that convert labeled examples to a prompt, a target and choices, as promptsource does for T0 and BLOOMZ."""

import os
import pathlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from effscale.options import check, did_you_mean
from effscale.rlhf.data.record import Record

_TEMPLATE_KEYS = ("name", "input", "target", "choices")
_TASK_KEYS = ("task", "templates")


class PromptTemplateError(ValueError):
    """A template cannot be read, or an example does not match it."""


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """An example as text.

    Attributes:
        prompt: The input of the model.
        target: The expected answer.
        choices: The possible answers, including the target; empty if the answer is free text.
    """

    prompt: str
    target: str
    choices: tuple[str, ...] = ()

    @property
    def answer(self) -> int:
        """The index of the target in the choices."""
        return self.choices.index(self.target)

    @property
    def answers(self) -> list[str]:
        """The choices, each after a space, for ``effscale.evaluation.rank_answers``."""
        return [f" {choice}" for choice in self.choices]

    def record(self) -> Record:
        """Return a record for ``fine_tuning_rows``: the target follows the prompt after a space, as in BLOOMZ."""
        return Record(prompt=self.prompt, chosen=f" {self.target}")


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """A template that converts an example to a prompt and a target.

    Texts refer to fields of the example in braces, ``{premise}``; write ``{{`` for a literal brace. No code in a
    template is executed.

    Attributes:
        name: Name of the template.
        input: The prompt. It should end so that an answer must follow, with a period or ``Answer:``; otherwise a
            model may continue the input.
        target: The answer.
        choices: All possible answers, each a text with fields. Or one text ``{field}``, if that field contains a list
            of them.

    Raises:
        PromptTemplateError: A brace is not closed, or contains more than the name of a field.

    Example:
        >>> template = PromptTemplate(name="yes or no", input="{text} Is that so?", target="{label}", choices=("yes", "no"))
        >>> template.apply({"text": "Snow is white.", "label": "yes"})
        Prompted(prompt='Snow is white. Is that so?', target='yes', choices=('yes', 'no'))
    """

    name: str
    input: str
    target: str
    choices: tuple[str, ...] | str = ()

    def __post_init__(self):
        check(self, bool(self.name), "name", "a text")
        for text in self._texts:
            _fields(text, self.name)
        if isinstance(self.choices, str) and not self._field_of_choices:
            raise PromptTemplateError(
                f"template {self.name!r}: choices must be a list of texts, or '{{field}}' for a field with such a list, got {self.choices!r}"
            )

    @property
    def _texts(self) -> tuple[str, ...]:
        listed = (self.choices,) if isinstance(self.choices, str) else self.choices
        return (self.input, self.target, *listed)

    @property
    def _field_of_choices(self) -> str:
        """The name in ``{field}``; empty if choices are not such a text."""
        text = self.choices if isinstance(self.choices, str) else ""
        inner = text[1:-1]
        return inner if text == f"{{{inner}}}" and inner.isidentifier() else ""

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields that an example must have, in order of use."""
        found = [name for text in self._texts for name in _fields(text, self.name)]
        return tuple(dict.fromkeys(found))

    def apply(self, example: Mapping[str, Any]) -> Prompted:
        """Apply the template to an example.

        Raises:
            PromptTemplateError: The example lacks a field, the prompt or the target is empty, or the target is not
                one of the choices.
        """
        prompt, target = (self._filled(text, example) for text in (self.input, self.target))
        if isinstance(self.choices, str):
            listed = self._value(self._field_of_choices, example)
            if not isinstance(listed, list | tuple):
                raise PromptTemplateError(
                    f"template {self.name!r}: the field {self._field_of_choices!r} must be a list of choices, got {listed!r}"
                )
            choices = tuple(map(str, listed))
        else:
            choices = tuple(self._filled(choice, example) for choice in self.choices)
        if choices and (len(choices) < 2 or len(set(choices)) < len(choices)):
            raise PromptTemplateError(
                f"template {self.name!r}: choices must be at least two different ones, got {choices}"
            )
        for kind, text in (("prompt", prompt), ("target", target)):
            if not text.strip():
                raise PromptTemplateError(f"template {self.name!r}: the {kind} is empty")
        if choices and target not in choices:
            raise PromptTemplateError(
                f"template {self.name!r}: the target must be one of the choices {choices}, got {target!r}"
            )
        return Prompted(prompt=prompt, target=target, choices=choices)

    def _filled(self, text: str, example: Mapping[str, Any]) -> str:
        values = {name: self._value(name, example) for name in _fields(text, self.name)}
        return text.format_map(values)

    def _value(self, name: str, example: Mapping[str, Any]) -> Any:
        if name not in example:
            there = ", ".join(map(repr, example)) or "none"
            raise PromptTemplateError(
                f"template {self.name!r}: the example has no field {name!r}; its fields are {there}"
            )
        return example[name]


@dataclass(frozen=True, kw_only=True)
class PromptedTask:
    """A task with several templates.

    Attributes:
        name: Name of the task.
        templates: Different phrasings of the task.

    Raises:
        PromptTemplateError: There is no template, or two have the same name.
    """

    name: str
    templates: tuple[PromptTemplate, ...]

    def __post_init__(self):
        names = [template.name for template in self.templates]
        if not names or len(set(names)) < len(names):
            raise PromptTemplateError(
                f"task {self.name!r}: templates must be at least one, with distinct names, got {names}"
            )

    def prompted(
        self, examples: Sequence[Mapping[str, Any]], *, cap: int | None = None, seed: int = 0
    ) -> dict[str, list[Prompted]]:
        """Apply each template to the examples.

        Args:
            examples: The labeled examples.
            cap: Maximum number of examples per template, drawn independently, so that large datasets do not outweigh
                small ones. xP3 uses 100,000.
            seed: Seed of the drawing.

        Returns:
            The prompted examples by name of the template.

        Raises:
            PromptTemplateError: As for ``PromptTemplate.apply``.
            ValueError: ``cap`` is below 1.
        """
        if cap is not None and cap < 1:
            raise ValueError(f"cap must be at least 1, or None, got {cap}")
        made = {}
        for number, template in enumerate(self.templates):
            chosen: Sequence[int] = range(len(examples))
            if cap is not None and cap < len(examples):
                drawn = np.random.default_rng([seed, number]).permutation(len(examples))[:cap]
                chosen = drawn.tolist()
            made[template.name] = [template.apply(examples[i]) for i in chosen]
        return made


def read_tasks(*paths: str | os.PathLike[str]) -> tuple[PromptedTask, ...]:
    r"""Read tasks from YAML files.

    A file contains one task: its name under ``task``, and under ``templates`` a list of mappings with ``name``,
    ``input``, ``target`` and, if the possible answers are known, ``choices``.

    Args:
        paths: Files, or folders whose ``*.yaml`` files are read in alphabetical order.

    Raises:
        FileNotFoundError: A file does not exist, or a folder contains no task.
        PromptTemplateError: A file is not YAML, lacks a key, or has an unknown key.

    Example:
        >>> import tempfile
        >>> from effscale.rlhf.data import read_tasks
        >>> file = pathlib.Path(tempfile.mkdtemp(), "mood.yaml")
        >>> _ = file.write_text('''
        ... task: mood
        ... templates:
        ...   - name: question
        ...     input: "{review}\\nDid they like it?"
        ...     target: "{label}"
        ...     choices: ["yes", "no"]
        ... ''')
        >>> (task,) = read_tasks(file)
        >>> task.templates[0].fields
        ('review', 'label')
    """
    files = []
    for path in map(pathlib.Path, paths):
        if path.is_dir():
            inside = sorted(path.glob("*.yaml"))
            if not inside:
                raise FileNotFoundError(f"{path}: has no *.yaml file with a task")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such file or folder")
    return tuple(_read_task(file) for file in files)


def _read_task(file: pathlib.Path) -> PromptedTask:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PromptTemplateError(f"{file}: not YAML ({error})") from error
    task = _mapping(content, _TASK_KEYS, _TASK_KEYS, str(file))
    templates = task["templates"]
    if not isinstance(templates, list):
        raise PromptTemplateError(f"{file}: templates must be a list")
    made = []
    for number, item in enumerate(templates, 1):
        where = f"{file}: template {number}"
        fields = _mapping(item, _TEMPLATE_KEYS, _TEMPLATE_KEYS[:3], where)
        for key in _TEMPLATE_KEYS[:3]:
            if not isinstance(fields[key], str):
                raise PromptTemplateError(
                    f"{where}: {key} must be a text, got {fields[key]!r}. Put it in quotation marks"
                )
        choices = fields.get("choices", [])
        if not isinstance(choices, str):
            if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
                raise PromptTemplateError(
                    f"{where}: choices must be texts, got {choices!r}. YAML reads a bare yes or no as a boolean, so put them in quotation marks"
                )
            choices = tuple(choices)
        try:
            name, asked, target = (fields[key] for key in _TEMPLATE_KEYS[:3])
            made.append(PromptTemplate(name=name, input=asked, target=target, choices=choices))
        except ValueError as error:
            raise PromptTemplateError(f"{where}: {error}") from error
    return PromptedTask(name=str(task["task"]), templates=tuple(made))


def _mapping(
    value: Any, known: Sequence[str], needed: Sequence[str], where: str
) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise PromptTemplateError(f"{where}: must be a mapping with the keys {', '.join(known)}")
    for key in value:
        if key not in known:
            raise PromptTemplateError(
                f"{where}: unknown key {key!r}; {did_you_mean(str(key), known)}"
            )
    for key in needed:
        if key not in value:
            raise PromptTemplateError(f"{where}: the key {key!r} is missing")
    return value


def _fields(text: str, name: str) -> tuple[str, ...]:
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise PromptTemplateError(
            f"template {name!r}: {text!r}: {error}. Write {{{{ for a literal brace"
        ) from error
    found = []
    for _, field, form, conversion in pieces:
        if field is None:
            continue
        if not field.isidentifier() or form or conversion:
            raise PromptTemplateError(
                f"template {name!r}: braces must contain only the name of a field, got {{{field}}} in {text!r}"
            )
        found.append(field)
    return tuple(found)
