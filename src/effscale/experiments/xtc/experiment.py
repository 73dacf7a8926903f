"""A fine-tuned BERT loses half of its layers, then nearly all of its bits, and learns from what it was: XTC.

MiniLM, a BERT of 6 layers, is fine-tuned to tell which document a passage of 32 tokens is from. That is the teacher. A student begins
as three of its layers and learns from its logits, attention scores and hidden states (one-stage distillation). From that student
two others begin, with ternary and with binary layers and token table, and 8-bit inputs of products; they learn from the same teacher in the
same way. What is asked: how much accuracy is left at what size, and how much does a longer training give back?

All arms try the same learning rates at every budget, with seed 0, and the best on held-out dev passages is taken for all seeds. Of each
run the checkpoint that was best on them counts. What is measured, on other held-out passages, is the packed model.

    python -m effscale.experiments.xtc
    python -m effscale.experiments.xtc --budgets 100 300 1000 3000 --seeds 5
    python -m effscale.experiments.xtc --corpus 'text:books/*.txt' --classes 6
    python -m effscale.experiments.xtc --out runs/mine --resume

The model is installed by ``make assets``; the default corpus is the Python standard library of the running interpreter.
"""

import functools
import time

from effscale.experiments.shared.cli import messages, parse
from effscale.experiments.shared.console import status
from effscale.experiments.shared.host import keep_freed_memory
from effscale.experiments.shared.prepared import check_folder, resumable
from effscale.experiments.shared.results import Result, finish
from effscale.experiments.xtc.config import FREE, PRESETS, Config


def run(config: Config) -> Result:
    """Trains and measures all arms as ``config`` says and fills the run folder.

    Args:
        config: What to do.

    Returns:
        The named figures.

    Raises:
        ValueError: If parts of the config do not fit each other, the corpus or the model; or ``resume`` is set and the folder is
            of another config.
        ImportError: If the package with the model is not installed.
        FileExistsError: If ``out`` already holds a run and ``resume`` is not set.
        StoppedBySignal: After SIGTERM or Ctrl-C, when all is saved.
        FileNotFoundError: If all runs of an arm and budget diverged before their first evaluation, so that there is no model.
    """
    # Importing what only a run needs here keeps --help quick.
    import jax

    from effscale.experiments.shared.classifier.batches import digest
    from effscale.experiments.shared.classifier.model import classifier
    from effscale.experiments.xtc import report
    from effscale.experiments.xtc.arms import BINARY, FLOAT, TEACHER, TERNARY, Arm
    from effscale.experiments.xtc.passages import read_passages
    from effscale.experiments.xtc.pretrained import read_model
    from effscale.experiments.xtc.runs import Runner
    from effscale.training import RunFolder

    began = time.perf_counter()
    # What cannot work is refused before anything is written.
    check_folder(config, FREE)
    with status("reading passages and model"):
        model, tokenizer = read_model(config)
        data = read_passages(config, tokenizer)
    folder = RunFolder.create(
        config.out,
        name="xtc",
        config=config,
        data={
            **data.digests(),
            "model": {"digest": digest(jax.device_get(jax.tree.leaves(model)))},
        },
        resume=config.resume,
    )

    runner = lambda kind, origin, teacher=None: Runner(
        Arm(kind=kind, config=config), data, folder, origin=origin, teacher=teacher
    )
    once_each = functools.lru_cache(maxsize=1)
    teacher = runner(TEACHER, lambda seed: classifier(model, config.classes, seed))
    of_seed = once_each(teacher.model)
    student = runner(FLOAT, of_seed, of_seed)
    student_of_seed = once_each(student.model)
    runners = [teacher, student]
    runners += [runner(kind, student_of_seed, of_seed) for kind in (TERNARY, BINARY)]

    arms = {}
    with resumable(folder):
        for each in runners:
            searched = each.search()
            measured = [each.run(seed) for seed in range(config.seeds)]
            arms[each.arm.name] = report.ArmResults(
                searched=searched, rates=each.rates, measured=measured
            )

    figures = {
        "majority": data.majority,
        "test_size": len(data.test),
        "seeds_compared": config.seeds,
        **report.figures_of(arms),
    }
    report.draw(folder.figures, figures, {name: arm.budgets for name, arm in arms.items()})
    seeds = {f"{name}_accuracy": arm.values("test_accuracy").tolist() for name, arm in arms.items()}
    return finish(folder, "xtc", figures, report.tables_of(arms), seeds=seeds, began=began)


def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    with messages():
        config = parse(PRESETS, __doc__ or "", argv, name="python -m effscale.experiments.xtc")
        keep_freed_memory()
        run(config)


if __name__ == "__main__":
    main()
