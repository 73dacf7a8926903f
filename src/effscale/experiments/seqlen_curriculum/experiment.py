"""Sequence-length curriculum: start with short sequences, to stay stable at 8x the batch size and 4x the learning
rate.

A small GPT is trained with a small batch at the learning rate tuned for it, with a large batch at a large learning
rate, and with the same large batch whose rows are short at first and grow. All arms see the same number of tokens, in
the same order for each seed.

The experiment logs the paper's signs of instability: how far the loss rises above its minimum, and the norm and the
maximum of Adam's variance. Adam has no weight decay. Higher learning rates of the large batch show where each arm
fails.

    python -m effscale.experiments.seqlen_curriculum
    python -m effscale.experiments.seqlen_curriculum --learning-rate-factors 4 --seeds 5
    python -m effscale.experiments.seqlen_curriculum --out runs/mine --resume
"""

import itertools
import time

from effscale.experiments.seqlen_curriculum.config import FREE, PRESETS, Config
from effscale.experiments.shared.prepared import corpus_digests, prepared_corpora
from effscale.study.command import messages, parse
from effscale.study.folder import check_folder, open_folder, resumable
from effscale.study.host import keep_freed_memory
from effscale.study.results import Result, finish


def run(config: Config) -> Result:
    """Train according to ``config`` and fill the run folder.

    A run whose loss or gradient is not finite for ten steps ends there. That counts as a result.

    Args:
        config: Options of the run.

    Returns:
        The named figures.

    Raises:
        ValueError: The config is inconsistent or does not match the corpus; or ``resume`` is set and the folder has
            another config.
        FileExistsError: ``out`` already contains a run and ``resume`` is not set.
        StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
    """
    # Imports that only a run needs are here, so that --help is fast.
    from effscale.experiments.seqlen_curriculum import figures as draw
    from effscale.experiments.seqlen_curriculum import report
    from effscale.experiments.seqlen_curriculum.arms import Training, make_arms

    began = time.perf_counter()
    # Invalid settings raise before anything is written.
    arms = make_arms(config)
    check_folder(config, FREE)
    corpora, weights = prepared_corpora(config, tokenizer=config.tokenizer)
    training = Training(config, corpora, weights)
    folder = open_folder(config, "seqlen_curriculum", corpus_digests(corpora))
    try:
        with resumable(folder):
            for arm in arms:
                training.run(folder, arm)
    finally:
        training.close()

    runs = {arm.name: report.read(folder.path, arm, config) for arm in arms}
    figures = report.figures(runs)
    first = dict(itertools.islice(runs.items(), 3))
    draw.training(folder.figures / "training.png", first)
    draw.instability(folder.figures / "instability.png", first)
    draw.validation(folder.figures / "validation.png", first)
    if len(first) < len(runs):
        draw.learning_rates(folder.figures / "learning_rates.png", runs, figures)
    tables = report.tables(runs, figures)
    return finish(folder, "seqlen_curriculum", figures, tables, began=began, left=2)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see ``--help``."""
    with messages():
        name = "python -m effscale.experiments.seqlen_curriculum"
        config = parse(PRESETS, __doc__ or "", argv, name=name)
        keep_freed_memory()
        run(config)


if __name__ == "__main__":
    main()
