"""BLOOM's design choices at small scale: ALiBi against rotary and learned positions, also on rows longer than in
training, and the norm after the embedding.

All arms are the same model except for the choice they test, and learn from the same rows in the same order. Each arm
gets the same tuning: a search with the same rule, with a seed that is not used in the comparison, finds its learning
rate and warmup.

Then each arm is trained with several seeds and evaluated on the same held-out text, split into rows of the training
length and into longer ones. Nothing is learned about positions beyond the training length, so there a table of
learned positions still has its initial values.

    python -m effscale.experiments.bloom_ablations
    python -m effscale.experiments.bloom_ablations --arms alibi rotary --corpus 'text:books/*.txt'
    python -m effscale.experiments.bloom_ablations --out runs/mine --resume

References:
    Le Scao et al., "BLOOM: A 176B-Parameter Open-Access Multilingual Language Model" (2022), section 3.2.
        https://arxiv.org/abs/2211.05100
    Press et al., "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation" (2021).
        https://arxiv.org/abs/2108.12409
"""

import time

import numpy as np

from effscale.command.folder import Result, check_folder, finish, open_folder, resumable
from effscale.command.line import keep_freed_memory, messages, parse
from effscale.experiments.bloom_ablations.config import FREE, PRESETS, Config
from effscale.experiments.shared.prepared import corpus_digests, prepared_corpora
from effscale.parallel import shard_batch


def run(config: Config) -> Result:
    """Train according to ``config`` and fill the run folder.

    A run whose loss or gradient is not finite for ten steps ends there. That counts as a result, and the other runs continue.

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
    from effscale.data import parse_source
    from effscale.experiments.bloom_ablations import report
    from effscale.experiments.bloom_ablations.runs import Runner

    began = time.perf_counter()
    mesh = config.mesh.build()
    # Invalid settings raise before the corpus is prepared and before anything is written.
    parse_source(config.corpus)  # a single source: a mixture weight would have no effect
    shard_batch(np.zeros(config.batch_size, np.int8), mesh)
    check_folder(config, FREE)
    (corpus,), _ = prepared_corpora(config.pretraining("alibi"), tokenizer=config.tokenizer)
    runner = Runner(config, corpus, mesh)
    folder = open_folder(config, "bloom_ablations", corpus_digests([corpus]))
    with resumable(folder):
        found = {arm: runner.search(folder, arm) for arm in config.arms}
        for seed in range(config.seeds):
            for arm in config.arms:
                runner.run(folder, arm, seed, found[arm].best)
    losses = report.read(folder.path, config)
    named, each = report.figures(losses, config)
    report.draw(folder.figures / "bloom_ablations.png", losses, config)
    tables = report.tables(losses, config, found)
    return finish(folder, "bloom_ablations", named, tables, seeds=each, began=began)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see ``--help``."""
    with messages():
        config = parse(
            PRESETS, __doc__ or "", argv, name="python -m effscale.experiments.bloom_ablations"
        )
        keep_freed_memory()
        run(config)
