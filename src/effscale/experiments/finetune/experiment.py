"""Fine-tune pretrained text and image models in JAX and in PyTorch with the same recipe.

MiniLM, a BERT with 6 layers, learns the sentiment of 600 drug reviews; a ViT-S/14 learns scikit-learn's digits and
part of Fashion-MNIST. Each gets a new head. With ``--torch``, a baseline in transformers starts from the same files,
with the same head, batches and learning rates. Both run with several seeds, and their accuracies are compared.

    python -m effscale.experiments.finetune --torch
    python -m effscale.experiments.finetune --tasks reviews --seeds 5 --reviews.epochs 6
    python -m effscale.experiments.finetune --out runs/mine --resume

``make assets`` installs models and reviews; Debian's package dataset-fashion-mnist installs Fashion-MNIST.
"""

import time

from effscale.experiments.finetune.config import FREE, PRESETS, Config
from effscale.study.command import messages, parse
from effscale.study.console import status
from effscale.study.folder import check_folder, open_folder, resumable
from effscale.study.results import Result, finish


def run(config: Config) -> Result:
    """Fine-tune according to ``config`` and fill the run folder.

    Args:
        config: Options of the run.

    Returns:
        The named figures.

    Raises:
        ValueError: The config is inconsistent or does not match the data or the models; or ``resume`` is set and the
            folder has another config.
        ImportError: A package with a model or data is not installed, or ``torch`` is set and torch is not installed.
        FileExistsError: ``out`` already contains a run and ``resume`` is not set.
        StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
    """
    # Imports that only a run needs are here, so that --help is fast.
    from effscale.experiments.finetune import report, torch_twin
    from effscale.experiments.finetune.runs import Runner
    from effscale.experiments.shared.classifier.problem import prepare_images, prepare_reviews

    began = time.perf_counter()
    # Invalid settings raise before anything is written.
    if config.torch:
        torch_twin.require()
    check_folder(config, FREE)
    with status("reading data and models"):
        problems = [
            prepare_reviews(config.reviews, config.max_length, config.text_model)
            if task == "reviews"
            else prepare_images(task, config.recipe(task), config)
            for task in config.tasks
        ]
    folder = open_folder(
        config, "finetune", {problem.task: problem.digests() for problem in problems}
    )

    backends = report.BACKENDS if config.torch else report.BACKENDS[:1]
    comparisons = {}
    with resumable(folder):
        for problem in problems:
            runner = Runner(problem, config, folder)
            for seed in range(config.seeds):
                for backend in backends:
                    runner.run(backend, seed)
            comparisons[problem.task] = report.read_comparison(
                folder.path / problem.task,
                backends,
                config.seeds,
                test_size=len(problem.data.test),
                majority=problem.data.majority,
                per_epoch=problem.per_epoch,
            )

    figures = {
        f"{task}_{name}": value
        for task, comparison in comparisons.items()
        for name, value in comparison.figures().items()
    }
    report.draw(folder.figures / "accuracy.png", comparisons)
    rows = report.accuracy_rows(comparisons)
    tables = {"Test accuracy after the last epoch, in percent": rows}
    return finish(folder, "finetune", figures, tables, began=began, left=2)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see ``--help``."""
    with messages():
        config = parse(PRESETS, __doc__ or "", argv, name="python -m effscale.experiments.finetune")
        run(config)


if __name__ == "__main__":
    main()
