"""Fine-tune a pretrained ViT on images with and without random-LTD, with the same recipe and number of steps.

With random-LTD, all layers except the first and the last process part of an image's tokens at first, and all of them
after most of the steps. Both arms get the same images in the same order. The experiment measures whether the accuracy
is the same, and what is saved.

    python -m effscale.experiments.random_ltd_vit
    python -m effscale.experiments.random_ltd_vit --task digits --seeds 5
    python -m effscale.experiments.random_ltd_vit --out runs/mine --resume

``make assets`` installs the model; Debian's package dataset-fashion-mnist installs Fashion-MNIST.
"""

import time
from typing import Any

from effscale.experiments.random_ltd_vit.config import FREE, PRESETS, Config
from effscale.experiments.shared.random_ltd.arms import ARMS
from effscale.study.command import messages, parse
from effscale.study.console import status
from effscale.study.folder import check_folder, open_folder, resumable
from effscale.study.host import keep_freed_memory
from effscale.study.results import Result, finish


def run(config: Config) -> Result:
    """Fine-tune according to ``config`` and fill the run folder.

    Args:
        config: Options of the run.

    Returns:
        The named figures.

    Raises:
        ValueError: The config is inconsistent or does not match the data or the model; or ``resume`` is set and the
            folder has another config.
        ImportError: A package with the model or the digits is not installed.
        FileNotFoundError: Fashion-MNIST is not in its folder.
        FileExistsError: ``out`` already contains a run and ``resume`` is not set.
        StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
        TrainingDivergedError: The loss or gradient of a run is not finite for ten steps; resuming leads to the same
            error.
    """
    # Imports that only a run needs are here, so that --help is fast.
    from effscale.experiments.random_ltd_vit.runs import Runner
    from effscale.experiments.shared.classifier.problem import prepare_images
    from effscale.experiments.shared.random_ltd import report

    began = time.perf_counter()
    # Invalid settings raise before anything is written.
    check_folder(config, FREE)
    with status("reading data and model"):
        problem = prepare_images(config.task, config.recipe, config)
        runners = {name: Runner(name, problem, config) for name in ARMS}
    folder = open_folder(config, "random_ltd_vit", {config.task: problem.digests()})
    try:
        with resumable(folder):
            for seed in range(config.seeds):
                for runner in runners.values():
                    runner.run(folder, seed)
    finally:
        for runner in runners.values():
            runner.step.close()

    runs: dict[str, report.ArmRuns] = {
        name: report.ArmRuns.read(
            [folder.path / runner.name_of(seed) for seed in range(config.seeds)], runner.arm
        )
        for name, runner in runners.items()
    }
    accuracies: dict[str, Any] = {
        name: arm_runs.last("test_accuracy") for name, arm_runs in runs.items()
    }
    figures = {
        "majority": problem.data.majority,
        "test_size": len(problem.data.test),
        "tokens": runners["baseline"].arm.length,
        "steps": problem.steps,
        **report.quality_figures(accuracies, "accuracy"),
        **report.cost_figures(runs),
    }
    report.draw(
        folder.figures / "accuracy.png",
        runs,
        "part_test_accuracy",
        label=f"test accuracy on {config.task}\n(part of the images)",
        level=("most frequent label", problem.data.majority),
    )
    percent: dict[str, Any] = {name: 100 * values for name, values in accuracies.items()}
    tables = {
        "Test accuracy with all tokens kept, in percent": report.quality_rows(percent, decimals=1),
        "Cost of a run": report.cost_rows(figures),
    }
    seeds = {f"{name}_accuracy": each.tolist() for name, each in accuracies.items()}
    return finish(folder, "random_ltd_vit", figures, tables, seeds=seeds, began=began)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see ``--help``."""
    with messages():
        name = "python -m effscale.experiments.random_ltd_vit"
        config = parse(PRESETS, __doc__ or "", argv, name=name)
        keep_freed_memory()
        run(config)


if __name__ == "__main__":
    main()
