"""A small GPT and a small BERT learn from real text between workers that send one bit per number.

Each 1-bit optimizer runs beside the uncompressed one that it is to equal: same initial weights, same rows, same number of steps;
and Adam on gradients in one bit beside them, which the papers say fails. Then each model, and one that was not pretrained,
learns which document a passage comes from. What is asked: is the model as good, and how much was sent for it?

    python -m effscale.experiments.onebit
    python -m effscale.experiments.onebit --tasks gpt --optimizers adam onebit_adam --gpt.steps 1000
    python -m effscale.experiments.onebit --out runs/mine --resume

The workers are simulated on one device, with the collectives that as many devices would have. The default corpus is the Python
standard library of the running interpreter, so nothing is downloaded.
"""

import time

from effscale.experiments.onebit.config import FREE, PRESETS, Config
from effscale.experiments.shared.cli import messages, parse
from effscale.experiments.shared.host import keep_freed_memory
from effscale.experiments.shared.prepared import (
    check_folder,
    corpus_digests,
    prepared_corpora,
    resumable,
)
from effscale.experiments.shared.results import Result, finish


def run(config: Config) -> Result:
    """Pretrains and fine-tunes as ``config`` says and fills the run folder.

    Args:
        config: What to do.

    Returns:
        The named figures.

    Raises:
        ValueError: If parts of the config do not fit each other or the corpus; or ``resume`` is set and the folder is of
            another config.
        FileExistsError: If ``out`` already holds a run and ``resume`` is not set.
        StoppedBySignal: After SIGTERM or Ctrl-C, when all is saved.
        TrainingDivergedError: If loss or gradient of a run is not finite for ten steps. With ``resume`` and other
            ``optimizers`` the rest goes on without it.
    """
    # Importing what only a run needs here keeps --help quick.
    from effscale.data import unigram_entropy
    from effscale.experiments.onebit import report
    from effscale.experiments.onebit.runs import Pretraining
    from effscale.experiments.shared.classifier.passages import FineTuning
    from effscale.experiments.shared.masked_text import passages_data
    from effscale.training import RunFolder

    began = time.perf_counter()
    # What cannot work is refused before anything is written.
    check_folder(config, FREE)
    corpora, weights = prepared_corpora(config)
    passages = passages_data(corpora, config)
    folder = RunFolder.create(
        config.out,
        name="onebit",
        config=config,
        data=corpus_digests(corpora),
        resume=config.resume,
    )
    with resumable(folder):
        for task in config.tasks:
            fine_tuning = FineTuning(config, passages)
            for name in config.optimizers:
                pretraining = Pretraining(config, task, name, corpora, weights)
                for seed in range(config.seeds):
                    pretraining.run(folder, seed)
                    fine_tuning.run(folder, pretraining.name_of(seed), seed)
            for seed in range(config.seeds):
                like = f"{task}/seed-{seed}/{config.optimizers[0]}"
                fine_tuning.run(folder, f"{task}/seed-{seed}/scratch", seed, like=like)

    runs = {task: report.read(folder.path, task, config) for task in config.tasks}
    figures: dict[str, float | int] = {
        "unigram_entropy": unigram_entropy([corpus.validation for corpus in corpora]),
        "majority": passages.majority,
        "test_size": len(passages.test),
    }
    for task, found in runs.items():
        figures |= report.figures(task, found)
    report.draw(folder.figures / "onebit.png", runs, majority=passages.majority)
    tables = {
        title: rows for task, found in runs.items() for title, rows in report.tables(task, found)
    }
    return finish(folder, "onebit", figures, tables, began=began)


def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    with messages():
        config = parse(PRESETS, __doc__ or "", argv, name="python -m effscale.experiments.onebit")
        keep_freed_memory()
        run(config)


if __name__ == "__main__":
    main()
