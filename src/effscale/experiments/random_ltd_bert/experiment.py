"""Pretrain a small BERT on real text with and without random-LTD, for the same number of steps, then fine-tune both
on a task.

With random-LTD, all layers except the first and the last process a quarter of a row's tokens at first, and nearly all
of them at the end: all would be kept after the last step. Both arms get the same rows with the same tokens masked.
The tokens that a layer keeps are drawn independently of the mask, as in the paper; masked tokens that are not kept
bypass the layer.

Then each model, and one that was not pretrained, learns to classify which document a passage comes from. The
experiment measures whether the model is as good, and what is saved.

Both arms get the same tuning: the learning rate warms up by steps, and a search with the same rule, with a seed that
is not used in the comparison, finds each arm's peak and warmup. Finally both arms run the first steps at a high
learning rate, with more seeds, to test whether one is more stable than the other.

    python -m effscale.experiments.random_ltd_bert
    python -m effscale.experiments.random_ltd_bert --corpus 'text:books/*.txt' --classes 6 --steps 2000
    python -m effscale.experiments.random_ltd_bert --out runs/mine --resume

The default corpus is the standard library of the running Python, so nothing is downloaded. Each pretrained model is
a Hugging Face folder, ``seed-<n>/<arm>/model`` in the run folder.
"""

import time
from typing import Any

import numpy as np

from effscale.experiments.random_ltd_bert.config import FREE, PRESETS, Config
from effscale.experiments.shared.prepared import corpus_digests, prepared_corpora
from effscale.experiments.shared.random_ltd.arms import ARMS
from effscale.study.command import messages, parse
from effscale.study.folder import check_folder, open_folder, resumable
from effscale.study.host import keep_freed_memory
from effscale.study.results import Result, finish
from effscale.study.search import Found


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
        TrainingDivergedError: The loss or gradient of a compared run is not finite for ten steps; resuming leads to
            the same error. In the search and in the first steps at a high learning rate, divergence counts as a
            result.
    """
    # Imports that only a run needs are here, so that --help is fast.
    from effscale.data import unigram_entropy
    from effscale.experiments.random_ltd_bert import report as bert_report
    from effscale.experiments.random_ltd_bert.runs import Pretraining
    from effscale.experiments.shared.classifier.passages import FineTuning
    from effscale.experiments.shared.masked_text import passages_data
    from effscale.experiments.shared.random_ltd import report

    began = time.perf_counter()
    # Invalid settings raise before anything is written.
    check_folder(config, FREE)
    corpora, weights = prepared_corpora(config)
    passages = passages_data(corpora, config)
    pretraining = {arm: Pretraining(arm, config, corpora, weights) for arm in ARMS}
    fine_tuning = FineTuning(config, passages)
    folder = open_folder(config, "random_ltd_bert", corpus_digests(corpora))
    found: dict[str, Found] = {}
    early_losses: dict[str, list[float]] = {}
    try:
        with resumable(folder):
            for name, arm in pretraining.items():
                found[name] = arm.search(folder)
            for seed in range(config.seeds):
                for name, arm in pretraining.items():
                    arm.run(folder, seed, found[name].best)
                for name in ARMS:
                    fine_tuning.run(folder, f"seed-{seed}/{name}", seed)
                fine_tuning.run(folder, f"seed-{seed}/scratch", seed, like=f"seed-{seed}/{ARMS[0]}")
            for name, arm in pretraining.items():
                early_losses[name] = [arm.early(folder, seed) for seed in range(config.early.seeds)]
    finally:
        for arm in pretraining.values():
            arm.step.close()

    seeds = range(config.seeds)
    runs: dict[str, report.ArmRuns] = {
        name: report.ArmRuns.read([folder.path / arm.name_of(seed) for seed in seeds], arm.arm)
        for name, arm in pretraining.items()
    }
    accuracies: dict[str, Any] = {
        start: report.last_values(
            [folder.path / f"seed-{seed}/{start}/passages" for seed in seeds], "test_accuracy"
        )
        for start in (*ARMS, "scratch")
    }
    entropy = unigram_entropy([corpus.validation for corpus in corpora])
    losses: dict[str, Any] = {name: arm_runs.last("val_loss") for name, arm_runs in runs.items()}
    early: dict[str, Any] = {name: np.array(each) for name, each in early_losses.items()}
    costs = report.cost_figures(runs)
    figures = {
        "unigram_entropy": entropy,
        "majority": passages.majority,
        "test_size": len(passages.test),
        "steps": config.steps,
        **report.quality_figures(losses, "val_loss"),
        **report.quality_figures(accuracies, "accuracy"),
        **bert_report.early_figures(early, entropy),
        **bert_report.search_figures(found),
        **costs,
    }
    report.draw(
        folder.figures / "loss.png",
        runs,
        "part_val_loss",
        label="loss on part of the held-out text\n(nats per hidden token)",
        after=("accuracy on the fine-tuning task", accuracies),
    )
    percent: dict[str, Any] = {name: 100 * values for name, values in accuracies.items()}
    tables = {
        "Validation loss with all tokens kept, in nats per hidden token": report.quality_rows(
            losses, decimals=3
        ),
        "Test accuracy after fine-tuning, in percent": report.quality_rows(percent, decimals=1),
        "Cost of pretraining": report.cost_rows(costs),
        "Result of the search for each arm": bert_report.search_rows(found),
    }
    if config.search.points > 1:
        tables["Validation loss of every run of the search"] = bert_report.tried_rows(found)
    if config.early.seeds:
        first = f"The first {config.early.steps} steps at {config.early.learning_rate:g}"
        title = f"{first}: loss at their end on part of the held-out text"
        tables[title] = bert_report.early_rows(early, entropy)
    each = {"val_loss": losses, "accuracy": accuracies, "early_val_loss": early}
    seeds_of = bert_report.each_seed(each)
    return finish(folder, "random_ltd_bert", figures, tables, seeds=seeds_of, began=began)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see ``--help``."""
    with messages():
        name = "python -m effscale.experiments.random_ltd_bert"
        config = parse(PRESETS, __doc__ or "", argv, name=name)
        keep_freed_memory()
        run(config)


if __name__ == "__main__":
    main()
