"""Pretrain a GPT with less data: curriculum learning, random-LTD and both, compared with the baseline.

Each technique trains on the whole token budget and on fractions of it, with several seeds. The budget counts
layer-averaged tokens: those that a layer processes, averaged over the layers. A technique that uses short rows or
drops tokens therefore takes more steps on the same budget. Validation is on all tokens of whole rows. The comparison
covers the final loss, and the data, operations and time that each technique needs to reach the loss of the baseline.

Every technique gets the same tuning: its learning rate warms up by steps, and a search with the same rule, with a
seed that is not used in the comparison, finds its peak and warmup.

    python -m effscale.experiments.data_efficiency
    python -m effscale.experiments.data_efficiency --techniques none ltd --fractions 1.0 0.67 --seeds 5
    python -m effscale.experiments.data_efficiency --out runs/mine --resume

References:
    Li et al., "DeepSpeed Data Efficiency: Improving Deep Learning Model Quality and Training Efficiency via Efficient
        Data Sampling and Routing" (2022), section 4.1. https://arxiv.org/abs/2212.03597
"""

import time

import numpy as np

from effscale.experiments.data_efficiency.config import FREE, PRESETS, Config
from effscale.experiments.shared.prepared import corpus_digests, prepared_corpora
from effscale.parallel import shard_batch
from effscale.study.command import messages, parse
from effscale.study.folder import check_folder, open_folder, resumable
from effscale.study.host import keep_freed_memory
from effscale.study.results import Result, finish


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
    from effscale.data import parse_source, save_tokenizer
    from effscale.experiments.data_efficiency import report
    from effscale.experiments.data_efficiency.figures import draw
    from effscale.experiments.data_efficiency.runs import Runner

    began = time.perf_counter()
    mesh = config.mesh.build()
    # Invalid settings raise before the corpus is prepared and before anything is written.
    parse_source(config.corpus)  # a single source: a mixture weight would have no effect
    shard_batch(np.zeros(config.batch_size, np.int8), mesh)
    check_folder(config, FREE)
    one = config.pretraining("none", 1.0)  # the text is the same for all runs
    (corpus,), _ = prepared_corpora(one, tokenizer=one.tokenizer)
    runner = Runner(config, corpus, mesh)
    folder = open_folder(config, "data_efficiency", corpus_digests([corpus]))
    save_tokenizer(corpus.tokenizer, folder.path)
    with resumable(folder):
        found = {technique: runner.search(folder, technique) for technique in config.techniques}
        for fraction in config.fractions:
            for technique in config.techniques:
                for seed in range(config.seeds):
                    runner.run(folder, technique, fraction, seed, found[technique].best)
                runner.forget(technique, fraction)

    comparison = report.read(folder.path, config, corpus.vocab_size, found)
    figures = comparison.figures()
    draw(folder.figures, comparison)
    tables = report.tables(comparison)
    seeds = comparison.seeds()
    return finish(folder, "data_efficiency", figures, tables, seeds=seeds, began=began, left=2)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see ``--help``."""
    with messages():
        config = parse(
            PRESETS, __doc__ or "", argv, name="python -m effscale.experiments.data_efficiency"
        )
        keep_freed_memory()
        run(config)


if __name__ == "__main__":
    main()
