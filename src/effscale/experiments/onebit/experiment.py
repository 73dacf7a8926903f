"""Pretrain a small GPT and a small BERT on real text with workers that exchange one bit per parameter.

Each 1-bit optimizer is compared with its uncompressed baseline: same initial weights, same rows, same number of
steps. A third arm, Adam on one-bit gradients, fails according to the papers. Then each model, and one that was not
pretrained, learns to classify which document a passage comes from. The experiment measures whether the model is as
good, and how much data was sent.

    python -m effscale.experiments.onebit
    python -m effscale.experiments.onebit --tasks gpt --optimizers adam onebit_adam --gpt.steps 1000
    python -m effscale.experiments.onebit --out runs/mine --resume

The workers are simulated on one device, with the same collectives as on separate devices. The default corpus is
the standard library of the running Python, so nothing is downloaded.
"""

import time

from effscale.experiments.onebit.config import FREE, PRESETS, Config
from effscale.experiments.shared.prepared import corpus_digests, prepared_corpora
from effscale.study.command import messages, parse
from effscale.study.folder import check_folder, open_folder, resumable
from effscale.study.host import keep_freed_memory
from effscale.study.results import Result, finish


def run(config: Config) -> Result:
    """Pretrain and fine-tune according to ``config`` and fill the run folder.

    Args:
        config: Options of the run.

    Returns:
        The named figures.

    Raises:
        ValueError: The config is inconsistent or does not match the corpus; or ``resume`` is set and the folder has
            another config.
        FileExistsError: ``out`` already contains a run and ``resume`` is not set.
        StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
        TrainingDivergedError: The loss or gradient of a run is not finite for ten steps. Use ``resume`` with other
            ``optimizers`` to continue without it.
    """
    # Imports that only a run needs are here, so that --help is fast.
    from effscale.data import unigram_entropy
    from effscale.experiments.onebit import report
    from effscale.experiments.onebit.runs import Pretraining
    from effscale.experiments.shared.classifier.passages import FineTuning
    from effscale.experiments.shared.masked_text import passages_data

    began = time.perf_counter()
    # Invalid settings raise before anything is written.
    check_folder(config, FREE)
    corpora, weights = prepared_corpora(config)
    passages = passages_data(corpora, config)
    folder = open_folder(config, "onebit", corpus_digests(corpora))
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
    """Run the command line; see ``--help``."""
    with messages():
        config = parse(PRESETS, __doc__ or "", argv, name="python -m effscale.experiments.onebit")
        keep_freed_memory()
        run(config)


if __name__ == "__main__":
    main()
