"""XTC: distill a fine-tuned BERT into half of its layers, then quantize it to two bits and one bit.

MiniLM, a BERT with 6 layers, is fine-tuned to classify which document a passage of 32 tokens comes from. This is the
teacher. A student is initialized from three of its layers and learns from its logits, attention scores and hidden
states (one-stage distillation). Two more students are initialized from that one, with ternary and with binary layers
and token embeddings, and 8-bit inputs; they learn from the same teacher in the same way.

The experiment measures how much accuracy is left at which size, and how much longer training recovers. All arms try
the same learning rates at every budget with seed 0, and the best one on held-out dev passages is used for all seeds.
Of each run, the best checkpoint on the dev passages counts. The packed model is evaluated on other held-out passages.

    python -m effscale.experiments.xtc
    python -m effscale.experiments.xtc --budgets 100 300 1000 3000 --seeds 5
    python -m effscale.experiments.xtc --corpus 'text:books/*.txt' --classes 6
    python -m effscale.experiments.xtc --out runs/mine --resume

``make assets`` installs the model; the default corpus is the standard library of the running Python.
"""

import functools
import time

from effscale.command.folder import Result, check_folder, finish, open_folder, resumable
from effscale.command.line import keep_freed_memory, messages, parse
from effscale.command.terminal import status
from effscale.experiments.xtc.config import FREE, PRESETS, Config


def run(config: Config) -> Result:
    """Train and evaluate all arms according to ``config`` and fill the run folder.

    Args:
        config: Options of the run.

    Returns:
        The named figures.

    Raises:
        ValueError: The config is inconsistent or does not match the corpus or the model; or ``resume`` is set and the
            folder has another config.
        ImportError: The package with the model is not installed.
        FileExistsError: ``out`` already contains a run and ``resume`` is not set.
        StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
        FileNotFoundError: All runs of an arm and budget diverged before their first evaluation, so there is no model.
    """
    # Imports that only a run needs are here, so that --help is fast.
    import jax

    from effscale.experiments.shared.classifier.batches import digest
    from effscale.experiments.shared.classifier.model import classifier
    from effscale.experiments.xtc import report
    from effscale.experiments.xtc.arms import BINARY, FLOAT, TEACHER, TERNARY, Arm
    from effscale.experiments.xtc.passages import read_passages
    from effscale.experiments.xtc.pretrained import read_model
    from effscale.experiments.xtc.runs import Runner

    began = time.perf_counter()
    # Invalid settings raise before anything is written.
    check_folder(config, FREE)
    with status("reading passages and model"):
        model, tokenizer = read_model(config)
        data = read_passages(config, tokenizer)
    folder = open_folder(
        config,
        "xtc",
        {
            **data.digests(),
            "model": {"digest": digest(jax.device_get(jax.tree.leaves(model)))},
        },
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
    """Run the command line; see ``--help``."""
    with messages():
        config = parse(PRESETS, __doc__ or "", argv, name="python -m effscale.experiments.xtc")
        keep_freed_memory()
        run(config)


if __name__ == "__main__":
    main()
