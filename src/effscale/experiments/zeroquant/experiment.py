"""Pretrained models in 8 and 4 bits: the cost of rounding, and how much of it LKD and GPTQ recover.

SmolLM2-135M is quantized with ZeroQuant's recipes, with GPTQ, and with --peers also by torchao and qwix; its
perplexity is measured on Wikipedia and on Python source. MiniLM is fine-tuned on drug reviews, then quantized; its
accuracy is measured.

    python -m effscale.experiments.zeroquant --peers
    python -m effscale.experiments.zeroquant --models minilm --seeds 5
    python -m effscale.experiments.zeroquant --models smollm2 --language-model FOLDER --group-size 128
    python -m effscale.experiments.zeroquant --out runs/mine --resume

``make assets`` installs models and texts; ``pip install accelerate qwix torch torchao transformers`` installs the
peers.
"""

import time
from typing import Any

from effscale.command.folder import Result, check_folder, finish, open_folder, resumable
from effscale.command.line import messages, parse
from effscale.command.terminal import status
from effscale.experiments.zeroquant.config import FREE, PRESETS, Config


def run(config: Config) -> Result:
    """Quantize and evaluate according to ``config`` and fill the run folder.

    Args:
        config: Options of the run.

    Returns:
        The named figures.

    Raises:
        ValueError: The config is inconsistent or does not match the texts or the models; or ``resume`` is set and the
            folder has another config.
        ImportError: A package with a model or text is not installed, or ``peers`` is set and one of them is not
            installed.
        FileExistsError: ``out`` already contains a run and ``resume`` is not set.
        StoppedBySignal: After SIGTERM or Ctrl-C while the classifier is trained, when all is saved.
    """
    # Imports that only a run needs are here, so that --help is fast.
    from effscale.experiments.shared.classifier.batches import digest
    from effscale.experiments.shared.classifier.problem import prepare_reviews
    from effscale.experiments.zeroquant import language, peers, report
    from effscale.experiments.zeroquant.arms import make_arms
    from effscale.experiments.zeroquant.classifier import ClassifierRuns

    began = time.perf_counter()
    # Invalid settings raise before anything is written.
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
    folder = open_folder(config, "zeroquant", data)

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
    """Run the command line; see ``--help``."""
    with messages():
        config = parse(
            PRESETS, __doc__ or "", argv, name="python -m effscale.experiments.zeroquant"
        )
        run(config)


if __name__ == "__main__":
    main()
