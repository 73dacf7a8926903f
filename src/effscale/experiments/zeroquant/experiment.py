"""Trained models in 8 and 4 bits: what rounding costs, and what LKD and GPTQ give back.

SmolLM2-135M is quantized by ZeroQuant's recipes, by GPTQ, and with --peers by torchao and qwix; its perplexity is measured on
Wikipedia and on Python source. MiniLM is fine-tuned on drug reviews, then quantized; its accuracy is measured.

    python -m effscale.experiments.zeroquant --peers
    python -m effscale.experiments.zeroquant --models minilm --seeds 5
    python -m effscale.experiments.zeroquant --models smollm2 --language-model FOLDER --group-size 128
    python -m effscale.experiments.zeroquant --out runs/mine --resume

Models and texts are installed by ``make assets``; the peers by ``pip install 'effscale[peers]'``.
"""

import time
from typing import Any

from effscale.experiments.shared.cli import messages, parse
from effscale.experiments.shared.console import status
from effscale.experiments.shared.prepared import check_folder, resumable
from effscale.experiments.shared.results import Result, finish
from effscale.experiments.zeroquant.config import FREE, PRESETS, Config


def run(config: Config) -> Result:
    """Quantizes and measures as ``config`` says and fills the run folder.

    Args:
        config: What to do.

    Returns:
        The named figures.

    Raises:
        ValueError: If parts of the config do not fit each other, the texts or the models; or ``resume`` is set and the
            folder is of another config.
        ImportError: If a package with a model or text is not installed, or ``peers`` is set and one of them is not.
        FileExistsError: If ``out`` already holds a run and ``resume`` is not set.
        StoppedBySignal: After SIGTERM or Ctrl-C while the classifier is trained, when all is saved.
    """
    # Importing what only a run needs here keeps --help quick.
    from effscale.experiments.shared.classifier.batches import digest
    from effscale.experiments.shared.classifier.problem import prepare_reviews
    from effscale.experiments.zeroquant import language, peers, report
    from effscale.experiments.zeroquant.arms import make_arms
    from effscale.experiments.zeroquant.classifier import ClassifierRuns
    from effscale.training import RunFolder

    began = time.perf_counter()
    # What cannot work is refused before anything is written.
    if config.peers:
        peers.require()
    check_folder(config, FREE)
    data: dict[str, Any] = {}
    words = classes = None
    with status("reading texts and models"):
        if "smollm2" in config.models:
            words = language.prepare(config)
            arrays = [*words.tests.values(), words.calibration]
            data["smollm2"] = {"texts": digest(arrays), "model": words.source.name}
        if "minilm" in config.models:
            classes = prepare_reviews(config.reviews, config.max_length, config.text_model)
            data["minilm"] = classes.digests()
    folder = RunFolder.create(
        config.out, name="zeroquant", config=config, data=data, resume=config.resume
    )

    arms = make_arms(config.group_size)
    figures: dict[str, float] = {}
    tables: dict[str, list[list[str]]] = {}
    with resumable(folder):
        if words is not None:
            runs = language.LanguageRuns(words, config, folder)
            runs.run()
            found = {name: runs.found(name) for name in runs.names}
            sensitivity = runs.found("sensitivity")
            figures |= report.language_figures(found) | report.sensitivity_figures(sensitivity)
            rows = report.language_rows(found, arms)
            tables["SmolLM2 on Wikipedia and on Python source; losses in nats per token"] = rows
            report.draw_language(folder.figures / "perplexity.png", figures, arms)
            report.draw_sensitivity(folder.figures / "sensitivity.png", sensitivity)
        if classes is not None:
            trained = ClassifierRuns(classes, config, folder)
            trained.run()
            seeds = [trained.found(seed) for seed in range(config.seeds)]
            figures |= report.classifier_figures(seeds, classes.data.majority)
            rows = report.classifier_rows(seeds, arms)
            tables["MiniLM: test accuracy in percent, and its change in percentage points"] = rows
    return finish(folder, "zeroquant", figures, tables, began=began)


def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    with messages():
        config = parse(
            PRESETS, __doc__ or "", argv, name="python -m effscale.experiments.zeroquant"
        )
        run(config)


if __name__ == "__main__":
    main()
