"""Evaluates a model folder on tasks of the harness: ``python -m effscale.evaluation.harness --model FOLDER --tasks NAMES``."""

import difflib
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Literal

import tyro

from effscale.evaluation.harness.model import HarnessModel


def evaluate(
    model: pathlib.Path,
    tasks: str,
    include_path: pathlib.Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    gen_kwargs: str = "",
    apply_chat_template: bool = False,
    output: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Runs tasks of EleutherAI's lm-evaluation-harness on a model folder, and shows its table.

    Args:
        model: The model folder or GGUF file.
        tasks: Names of tasks or groups, with commas between them; ``*`` stands for any letters.
        include_path: A folder with tasks of your own. Only these are known then; otherwise those that come with the harness, whose data are downloaded from the
            Hugging Face hub.
        num_fewshot: Examples before each question, in place of what the task says.
        limit: Only so many questions of each task.
        batch_size: Rows of a batch.
        max_length: Tokens that the model reads at once; by default what its folder says.
        dtype: Type of the weights; by default that of the file.
        gen_kwargs: Options of generation in place of the tasks', such as temperature=0.8,max_gen_toks=64.
        apply_chat_template: Put questions into the model's chat template, which needs transformers.
        output: A file for the results, as JSON.
    """
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"--include-path {str(include_path)!r} is no folder")
    tokenizer = _of_transformers(model) if apply_chat_template else None
    options = {"batch_size": batch_size, "max_length": max_length, "dtype": dtype}
    lm = HarnessModel(model, tokenizer, **options)  # before lm_eval: it says what is missing

    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table

    manager = TaskManager(
        include_path=None if include_path is None else str(include_path),
        include_defaults=include_path is None,
    )
    names = _matching(tasks, manager)
    results = simple_evaluate(
        model=lm,
        tasks=names,
        num_fewshot=num_fewshot,
        limit=limit,
        gen_kwargs=gen_kwargs or None,
        apply_chat_template=apply_chat_template,
        task_manager=manager,
    )
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if output is not None:
        text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        output.write_text(text + "\n", encoding="utf-8")
        print(f"written: {output}")
    return results


def _matching(tasks: str, manager: Any) -> list[str]:
    """The names of tasks that are meant, of which some may have wildcards."""
    given = [name.strip() for name in tasks.split(",") if name.strip()]
    if not given:
        raise ValueError(f"--tasks {tasks!r}: must name at least one task")
    for one in given:
        if not manager.match_tasks([one]):
            near = difflib.get_close_matches(one, manager.all_tasks, n=5) or manager.all_tasks[:5]
            raise ValueError(f"--tasks: there is no {one!r}; there is {', '.join(near) or 'none'}")
    return manager.match_tasks(given)


def _of_transformers(folder: pathlib.Path) -> Any:
    """The folder's tokenizer with its chat template."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ImportError(
            "--apply-chat-template needs transformers: install it with pip install transformers"
        ) from None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see ``--help``. With ``EFFSCALE_TRACEBACK=1`` in the environment errors keep their traceback."""
    try:
        tyro.cli(evaluate, args=argv, prog="python -m effscale.evaluation.harness")
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("EFFSCALE_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
