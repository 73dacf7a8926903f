"""Compare dense models, mixtures of experts and their students, trained on real text for the same number of steps.

A mixture of experts with one expert per token computes as much as a dense model, and has several times its
parameters. The experiment measures how much lower its loss is, and how much longer a dense model must train to reach
it.

It also tests four observations of the paper. Are experts worth more in later layers? Is a dense feed-forward plus one
expert as good as two experts? Is a pyramid of residual experts as good as using its largest number of experts
everywhere, with fewer parameters? Is a shallower student, distilled until before the end, as good as its teacher? The
operations of each arm are counted.

    python -m effscale.experiments.moe
    python -m effscale.experiments.moe --arms dense moe --num-experts 16
    python -m effscale.experiments.moe --out runs/mine --resume

The default corpus is the standard library of the running Python, so nothing is downloaded.
"""

import time

from effscale.experiments.moe.config import FREE, PRESETS, Config
from effscale.experiments.shared.cli import messages, parse
from effscale.experiments.shared.host import keep_freed_memory
from effscale.experiments.shared.prepared import (
    check_folder,
    corpus_digests,
    open_folder,
    prepared_corpora,
    resumable,
)
from effscale.experiments.shared.results import Result, finish


def run(config: Config) -> Result:
    """Train all arms according to ``config`` and fill the run folder.

    Args:
        config: Options of the run.

    Returns:
        The named figures.

    Raises:
        ValueError: The config is inconsistent or does not match the corpus; or ``resume`` is set and the folder has
            another config.
        FileExistsError: ``out`` already contains a run and ``resume`` is not set.
        StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
        TrainingDivergedError: The loss or gradient of a run is not finite for ten steps.
    """
    # Imports that only a run needs are here, so that --help is fast.
    from effscale.data import unigram_entropy
    from effscale.experiments.moe import report
    from effscale.experiments.moe.runs import Training

    began = time.perf_counter()
    # Invalid settings raise before anything is written.
    check_folder(config, FREE)
    corpora, weights = prepared_corpora(config)
    folder = open_folder(config, "moe", corpus_digests(corpora))
    with resumable(folder):
        for name in config.arms:
            training = Training(config, name, corpora, weights)
            for seed in range(config.seeds):
                training.run(folder, seed)

    runs = report.read(folder.path, config, corpora[0].vocab_size)
    entropy = unigram_entropy([corpus.validation for corpus in corpora])
    report.draw(folder.figures, runs)
    named = {"unigram_entropy": entropy, **report.figures(runs)}
    return finish(folder, "moe", named, report.tables(runs), began=began)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see ``--help``."""
    with messages():
        config = parse(PRESETS, __doc__ or "", argv, name="python -m effscale.experiments.moe")
        keep_freed_memory()
        run(config)
