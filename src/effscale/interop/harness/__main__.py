"""Evaluate a model folder on tasks of the harness: ``python -m effscale.interop.harness --model FOLDER --tasks NAMES``."""

import difflib
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Literal

import tyro

from effscale.atomic import atomic_file
from effscale.interop.harness.model import HarnessModel
from effscale.paths import local_path, output_folder


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
    """Run tasks of EleutherAI's lm-evaluation-harness on a model folder, and print the table of results.

    Args:
        model: The model folder or GGUF file.
        tasks: The names of tasks or groups, separated by commas; ``*`` matches any letters.
        include_path: A folder with custom tasks. With it, only these are known; otherwise the tasks of the harness, whose
            data are downloaded from the Hugging Face Hub.
        num_fewshot: The number of examples before each question, instead of the task's default.
        limit: The maximum number of questions of each task.
        batch_size: The number of rows in a batch.
        max_length: The maximum number of tokens that the model reads; by default that of the model folder.
        dtype: The type of the weights; by default that of the file.
        gen_kwargs: Options of generation instead of the task's, such as temperature=0.8,max_gen_toks=64.
        apply_chat_template: Whether to put questions into the model's chat template, which needs transformers.
        output: A JSON file for the results.
    """
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"--include-path must be a folder, got {str(include_path)!r}")
    if output is not None:  # not only after hours of evaluation
        output_folder(local_path(output).absolute().parent)
    tokenizer = _of_transformers(model) if apply_chat_template else None
    options = {"batch_size": batch_size, "max_length": max_length, "dtype": dtype}
    lm = HarnessModel(
        model, tokenizer, **options
    )  # before importing lm_eval, as it reports what is missing

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
        with atomic_file(output) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        print(f"wrote {output}")
    return results


def _matching(tasks: str, manager: Any) -> list[str]:
    """Return the names of the requested tasks, with wildcards expanded."""
    given = [name.strip() for name in tasks.split(",") if name.strip()]
    if not given:
        raise ValueError(f"--tasks must name at least one task, got {tasks!r}")
    for one in given:
        if not manager.match_tasks([one]):
            near = difflib.get_close_matches(one, manager.all_tasks, n=5) or manager.all_tasks[:5]
            raise ValueError(
                f"--tasks must be known tasks, got {one!r}; similar tasks: {', '.join(near) or 'none'}"
            )
    return manager.match_tasks(given)


def _of_transformers(folder: pathlib.Path) -> Any:
    """Return the folder's tokenizer with its chat template."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ImportError(
            "--apply-chat-template needs transformers: install it with pip install transformers"
        ) from None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; see ``--help``. Set ``EFFSCALE_TRACEBACK=1`` in the environment to see tracebacks of errors."""
    try:
        tyro.cli(evaluate, args=argv, prog="python -m effscale.interop.harness")
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("EFFSCALE_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
