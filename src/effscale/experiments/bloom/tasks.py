"""Prompted tasks in several languages: those that a model is fine-tuned on, and those that it is evaluated on without having seen them."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import tokenizers

from effscale.evaluation import rank_answers
from effscale.experiments.bloom import messages
from effscale.experiments.bloom.config import Config
from effscale.experiments.bloom.messages import Split
from effscale.options import did_you_mean
from effscale.rlhf.data import Record, read_tasks
from effscale.rlhf.data.templates import Prompted, PromptedTask

FOLDER = pathlib.Path(__file__).parent / "tasks"
MIN_EXAMPLES = 8
"""A task with fewer test examples in a language is not evaluated in that language."""
Group = Literal["learned", "new language", "new task"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A task in a language.

    Attributes:
        task: Name of the task.
        language: The language.
        group: Whether the model was fine-tuned on the task in this language, in other languages, or not on the task at all.
    """

    task: str
    language: str
    group: Group


class Tasks:
    """The tasks of a run.

    Args:
        config: Config of the experiment.

    Raises:
        ValueError: ``new_tasks`` names an unknown task, two tasks have the same name, or no task is left to learn.
        FileNotFoundError: There is no task.
    """

    def __init__(self, config: Config):
        self._config = config
        self._examples: dict[tuple[Cell, Split], list[dict[str, Any]]] = {}
        self._tasks: dict[str, PromptedTask] = {}
        for task in read_tasks(config.tasks or FOLDER):
            if task.name in self._tasks:
                raise ValueError(
                    f"{config.tasks}: two files have the same task name, {task.name!r}"
                )
            self._tasks[task.name] = task
        for name in config.new_tasks:
            if name not in self._tasks:
                raise ValueError(
                    f"new_tasks has the unknown task {name!r}: {did_you_mean(name, self._tasks)}"
                )
        if len(config.new_tasks) == len(self._tasks):
            raise ValueError(
                f"new_tasks must leave at least one task to learn, got all of them: {config.new_tasks}"
            )

    def cells(self) -> Iterator[Cell]:
        """Yield all tasks in all languages."""
        for task in self._tasks:
            for language in self._config.languages:
                group: Group = "learned"
                if task in self._config.new_tasks:
                    group = "new task"
                elif language in self._config.new_languages:
                    group = "new language"
                yield Cell(task, language, group)

    def examples(self, cell: Cell, split: Split) -> list[dict[str, Any]]:
        """Return the labeled examples of a cell, always in the same shuffled order; empty if the task has none in the language."""
        key = cell, split
        if key not in self._examples:
            self._examples[key] = self._read(cell, split)
        return self._examples[key]

    def check(self) -> None:
        """Raise for examples that do not match their templates and for tasks that cannot be learned or evaluated, before training.

        Raises:
            ValueError: An example lacks a field, an evaluated task has no choices, or there are too few examples.
        """
        every = list(self.cells())
        for cell in every:
            for split in get_args(Split):
                for made in self._tasks[cell.task].prompted(self.examples(cell, split)).values():
                    if split != "train" and not all(prompted.choices for prompted in made):
                        raise ValueError(
                            f"task {cell.task!r}: only tasks with choices can be evaluated. Add choices to its templates"
                        )
        for task in self._tasks:
            if not any(self.examples(cell, "test") for cell in every if cell.task == task):
                raise ValueError(f"task {task!r} has no test examples in {self._config.languages}")
        if not any(self.examples(cell, "train") for cell in every if cell.group == "learned"):
            learned = sorted(set(self._tasks) - set(self._config.new_tasks))
            raise ValueError(
                f"there are no training examples for the tasks {learned} in the languages that are not in new_languages"
            )
        for split, count in (
            ("validation", self._config.selection_examples),
            ("test", self._config.eval_examples),
        ):
            enough = [cell for cell in every if self.prompted(cell, split, count)]
            if not any(cell.group != "learned" for cell in enough):
                raise ValueError(
                    f"no task has {min(MIN_EXAMPLES, count)} {split} examples in a new language, and no new task has them in any. Add examples, or change --new-languages and --new-tasks"
                )

    def digest(self) -> str:
        """Return a digest of templates and examples."""
        content = [repr(task) for task in self._tasks.values()]
        for cell in self.cells():
            content += [
                json.dumps(self.examples(cell, split), sort_keys=True) for split in get_args(Split)
            ]
        return hashlib.blake2b("\n".join(content).encode(), digest_size=16).hexdigest()

    def records(self, seed: int) -> list[Record]:
        """Return the fine-tuning records: learned tasks in learned languages, each capped."""
        found = []
        for cell in self.cells():
            if cell.group == "learned":
                made = self._tasks[cell.task].prompted(
                    self.examples(cell, "train"), cap=self._config.finetune.cap, seed=seed
                )
                found += [prompted.record() for each in made.values() for prompted in each]
        return found

    def prompted(self, cell: Cell, split: Split, count: int) -> Mapping[str, Sequence[Prompted]]:
        """Return the first examples of a cell with each template; empty if there are too few."""
        chosen = self.examples(cell, split)[:count]
        if len(chosen) < min(MIN_EXAMPLES, count):
            return {}
        return self._tasks[cell.task].prompted(chosen)

    def _read(self, cell: Cell, split: Split) -> list[dict[str, Any]]:
        if self._config.tasks is None:
            return messages.examples(cell.task, cell.language, split)
        file = self._config.tasks / cell.task / cell.language / f"{split}.jsonl"
        if not file.is_file():
            return []
        with file.open(encoding="utf-8-sig") as lines:
            read = [_line(file, number, line) for number, line in enumerate(lines, 1)]
        made = [example for example in read if example is not None]
        order = np.random.default_rng([*cell.task.encode(), *split.encode()]).permutation(len(made))
        return [made[i] for i in order]  # a file may be sorted by label


def _line(file: pathlib.Path, number: int, line: str) -> dict[str, Any] | None:
    if not line.strip():
        return None
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{number}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{file}:{number}: an example must be an object with fields, got {value!r}"
        )
    return value


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The accuracy of a model in a cell.

    Attributes:
        cell: The cell.
        of_template: The share of correct answers with each template.
        chance: The accuracy of guessing: the mean of one over the number of choices.
    """

    cell: Cell
    of_template: Mapping[str, float]
    chance: float

    @property
    def median(self) -> float:
        """The median over templates, as the papers report it."""
        return float(np.median(list(self.of_template.values())))


def evaluate_tasks(
    tasks: Tasks,
    model: Any,
    tokenizer: tokenizers.Tokenizer,
    *,
    split: Split,
    count: int,
    batch_size: int,
) -> list[Accuracy]:
    """Evaluate the cells that have enough examples by ranking: the most likely choice after the prompt is the answer."""
    asked = [
        (cell, template, prompted)
        for cell in tasks.cells()
        for template, each in tasks.prompted(cell, split, count).items()
        for prompted in each
    ]
    best = rank_answers(
        model,
        tokenizer,
        [prompted.prompt for _, _, prompted in asked],
        [prompted.answers for _, _, prompted in asked],
        batch_size=batch_size,
    ).best
    right: dict[Cell, dict[str, list[bool]]] = {}
    choices: dict[Cell, list[int]] = {}
    for (cell, template, prompted), chosen in zip(asked, best, strict=True):
        right.setdefault(cell, {}).setdefault(template, []).append(chosen == prompted.answer)
        choices.setdefault(cell, []).append(len(prompted.choices))
    return [
        Accuracy(
            cell,
            {template: float(np.mean(each)) for template, each in of_template.items()},
            float(np.mean(1 / np.array(choices[cell]))),
        )
        for cell, of_template in right.items()
    ]
