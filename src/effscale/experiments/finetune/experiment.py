"""Trained models of texts and of images are fine-tuned here and in PyTorch, by one recipe.

MiniLM, a BERT of 6 layers, learns the sentiment of 600 drug reviews; a ViT-S/14 learns scikit-learn's digits and some of
Fashion-MNIST. Each gets a new head. With ``--torch`` a twin in transformers starts from the same files, with the same head,
batches and learning rates; both are run over several seeds, and their accuracies are compared.

    python -m effscale.experiments.finetune --torch
    python -m effscale.experiments.finetune --tasks reviews --seeds 5 --reviews.epochs 6
    python -m effscale.experiments.finetune --out runs/mine --resume

Models and reviews are installed by ``make assets``; Fashion-MNIST by Debian's package dataset-fashion-mnist.
"""

import time

from effscale.experiments.finetune.config import FREE, PRESETS, Config
from effscale.experiments.shared.cli import messages, parse
from effscale.experiments.shared.console import status
from effscale.experiments.shared.prepared import check_folder, resumable
from effscale.experiments.shared.results import Result, finish


def run(config: Config) -> Result:
    """Fine-tunes as ``config`` says and fills the run folder.

    Args:
        config: What to do.

    Returns:
        The named figures.

    Raises:
        ValueError: If parts of the config do not fit each other, the data or the models; or ``resume`` is set and the
            folder is of another config.
        ImportError: If a package with a model or data is not installed, or ``torch`` is set and torch is not.
        FileExistsError: If ``out`` already holds a run and ``resume`` is not set.
        StoppedBySignal: After SIGTERM or Ctrl-C, when all is saved.
    """
    # Importing what only a run needs here keeps --help quick.
    from effscale.experiments.finetune import report, torch_twin
    from effscale.experiments.finetune.runs import Runner
    from effscale.experiments.shared.classifier.problem import prepare_images, prepare_reviews
    from effscale.training import RunFolder

    began = time.perf_counter()
    # What cannot work is refused before anything is written.
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
    folder = RunFolder.create(
        config.out,
        name="finetune",
        config=config,
        data={problem.task: problem.digests() for problem in problems},
        resume=config.resume,
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
    """The command line; see ``--help``."""
    with messages():
        config = parse(PRESETS, __doc__ or "", argv, name="python -m effscale.experiments.finetune")
        run(config)


if __name__ == "__main__":
    main()
