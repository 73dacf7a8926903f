"""A trained ViT is fine-tuned on images with and without random-LTD, by one recipe, in equally many steps.

All of its layers but the first and the last see a part of an image's tokens at first, and all of them after most of the
steps. Both arms get the same images in the same order. What is asked: is the accuracy the same, and what is saved?

    python -m effscale.experiments.random_ltd_vit
    python -m effscale.experiments.random_ltd_vit --task digits --seeds 5
    python -m effscale.experiments.random_ltd_vit --out runs/mine --resume

The model is installed by ``make assets``; Fashion-MNIST by Debian's package dataset-fashion-mnist.
"""

import dataclasses
import functools
import itertools
import pathlib
import time
from typing import Any, Literal

from effscale.experiments.cli import messages, parse
from effscale.experiments.console import status
from effscale.experiments.finetune import Recipe
from effscale.experiments.host import keep_freed_memory
from effscale.experiments.prepared import check_folder, resumable
from effscale.experiments.random_ltd import (
    ARMS,
    Arm,
    ArmName,
    Dropping,
    LearningRate,
    check_shared,
)
from effscale.experiments.results import Result, finish
from effscale.models.validation import check
from effscale.training import AdamWConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What the run does; every field is an option of the command line."""

    task: Literal["fashion", "digits"] = "fashion"
    """What is learned: Fashion-MNIST, or scikit-learn's digits."""
    seeds: int = 3
    """Runs of each arm; seeds 0, 1, ... decide the head's initial weights, the order of images and the tokens kept."""
    fashion: Recipe = Recipe(epochs=1, learning_rate=3e-5, train=1600, test=1000)
    """Fashion-MNIST; there are 60,000 and 10,000."""
    digits: Recipe = Recipe(epochs=1, learning_rate=3e-5, test=500)
    """Digits; there are 1,797 in all, the test examples included."""
    image_size: int = 98
    """Height and width to which images are resized, a multiple of the ViT's patch of 14: 98 make 50 tokens."""
    ltd: Dropping = Dropping(min_value=8, seq_per_step=8, share=0.8)
    """Random-LTD's schedule."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises; then it falls linearly by layer tokens to 0."""
    optimizer: AdamWConfig = AdamWConfig(b2=0.999, weight_decay=0.01)
    """AdamW."""
    clip_norm: float = 1.0
    """Greatest norm of the gradient."""
    eval_every: int = 25
    """Steps between evaluations on a part of the test images, and between checkpoints; at the end all are taken, too."""
    eval_batches: int = 12
    """Batches in that part."""
    image_model: pathlib.Path | None = None
    """Folder of a ViT to use instead; its images should be normalized by ImageNet's mean and deviation."""
    fashion_mnist: pathlib.Path = pathlib.Path("/usr/share/datasets/fashion-mnist")
    """Folder of Fashion-MNIST's four files."""
    out: pathlib.Path | None = None
    """Folder of the run; by default runs/random_ltd_vit/<time>."""
    resume: bool = False
    """Go on with the run in --out: finished runs are kept, the last one goes on from its checkpoint."""

    def __post_init__(self):
        check_shared(self)
        check(self, self.image_size >= 1, "image_size", "at least 1")

    @property
    def recipe(self) -> Recipe:
        """The task's."""
        return getattr(self, self.task)


PRESETS = {
    "smoke": Config(
        task="digits",
        seeds=1,
        digits=Recipe(epochs=1, batch_size=8, learning_rate=3e-5, train=64, test=32),
        image_size=42,
        ltd=Dropping(min_value=4, seq_per_step=4, share=0.75),
        eval_every=4,
        eval_batches=2,
    ),
    "default": Config(),
    # Li et al., 2022: a ViT with 197 tokens, batches of 128, 32 to 197 tokens over 3910 steps, which are 10 of 13 epochs of
    # CIFAR. Theirs is SGD with 1e-4; the rate here is AdamW's.
    "paper": Config(
        fashion=Recipe(epochs=13, batch_size=128, learning_rate=5e-5),
        digits=Recipe(epochs=500, batch_size=128, learning_rate=5e-5, test=500),
        image_size=224,
        ltd=Dropping(min_value=32, seq_per_step=8, share=10 / 13),
        eval_every=468,
        eval_batches=10,
    ),
}

FREE = ("seeds", "fashion_mnist", "out", "resume")


def run(config: Config) -> Result:
    """Fine-tunes as ``config`` says and fills the run folder.

    Args:
        config: What to do.

    Returns:
        The named figures.

    Raises:
        ValueError: If parts of the config do not fit each other, the data or the model; or ``resume`` is set and the
            folder is of another config.
        ImportError: If a package with the model or the digits is not installed.
        FileNotFoundError: If Fashion-MNIST is not in its folder.
        FileExistsError: If ``out`` already holds a run and ``resume`` is not set.
        StoppedBySignal: After SIGTERM or Ctrl-C, when all is saved.
        TrainingDivergedError: If loss or gradient of a run is not finite for ten steps; with ``resume`` it is so again.
    """
    # Importing what only a run needs here keeps --help quick.
    from effscale.experiments import random_ltd_report as report
    from effscale.experiments.finetune_runner import prepare
    from effscale.training import RunFolder

    began = time.perf_counter()
    # What cannot work is refused before anything is written.
    check_folder(config, FREE)
    with status("reading data and model"):
        problem = prepare(config.task, config.recipe, config)
        runners = {name: Runner(name, problem, config) for name in ARMS}
    folder = RunFolder.create(
        config.out,
        name="random_ltd_vit",
        config=config,
        data={config.task: problem.digests()},
        resume=config.resume,
    )
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
        label=f"test accuracy (a part), {config.task}",
        level=("most frequent label", problem.data.majority),
    )
    percent: dict[str, Any] = {name: 100 * values for name, values in accuracies.items()}
    tables = {
        "Test accuracy in percent, all tokens kept": report.quality_rows(percent, decimals=1),
        "What a run costs": report.cost_rows(figures),
    }
    seeds = {f"{name}_accuracy": each.tolist() for name, each in accuracies.items()}
    return finish(folder, "random_ltd_vit", figures, tables, seeds=seeds, began=began)


class Runner:
    """Runs with or without random-LTD, compiled once for all seeds.

    Args:
        name: Which.
        problem: A ``finetune_runner.Problem``.
        config: A :class:`Config`.
    """

    def __init__(self, name: ArmName, problem: Any, config: Config):
        import jax

        from effscale.experiments.finetune_model import class_loss, classifier_config
        from effscale.training import make_eval_step

        self.problem, self.config = problem, config
        model: Any = classifier_config(problem.model.config, problem.data.num_classes)
        self.arm = Arm(
            name=name,
            model=model,
            dropping=config.ltd,
            length=model.inputs.num_tokens,
            batch_size=config.recipe.batch_size,
            num_steps=problem.steps,
        )
        warmup = round(config.warmup * problem.steps)
        rate = LearningRate(peak=config.recipe.learning_rate, warmup=warmup)
        self.optimizer = self.arm.optimizer(rate, config.optimizer)
        step = self.arm.train_step(class_loss, self.optimizer, clip_norm=config.clip_norm)
        self._restage = functools.partial(self.arm.staged, step)
        self.step = self._restage()
        self.eval_step = jax.jit(make_eval_step(class_loss))

    def name_of(self, seed: int) -> str:
        """The run's name, its folder inside the run folder."""
        return f"seed-{seed}/{self.arm.name}"

    def run(self, folder: Any, seed: int) -> None:
        """Makes a run, goes on with one that was stopped, or leaves a finished one as it is."""
        from effscale.experiments.finetune_batches import TrainingBatches
        from effscale.experiments.finetune_runner import once, train_to_end

        recipe = self.config.recipe
        batches = TrainingBatches(self.problem.data.train, batch_size=recipe.batch_size, seed=seed)
        once(
            folder,
            self.name_of(seed),
            lambda: train_to_end(
                folder,
                self.name_of(seed),
                self.step,
                batches,
                create=functools.partial(self._create, seed),
                num_steps=self.problem.steps,
                evaluate=self._evaluate,
                every=self.config.eval_every,
                restage=self._restage,
            ),
        )

    def _create(self, seed: int) -> Any:
        import jax

        from effscale.experiments.finetune_model import classifier
        from effscale.training import create_train_state

        model = classifier(self.problem.model, self.problem.data.num_classes, seed)
        return create_train_state(model, self.optimizer, key=jax.random.key(seed))

    def _evaluate(self, state: Any) -> dict[str, float]:
        from effscale.experiments.finetune_batches import evaluation_batches
        from effscale.training import evaluate

        def means(batches: int | None) -> dict[str, float]:
            test = evaluation_batches(self.problem.data.test, self.config.recipe.batch_size)
            return evaluate(state.model, self.eval_step, itertools.islice(test, batches))

        values = {"part_test_accuracy": means(self.config.eval_batches)["accuracy"]}
        if int(state.step) == self.problem.steps:
            last = means(None)
            values |= {f"test_{name}": last[name] for name in ("loss", "accuracy")}
        return values


def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    with messages():
        name = "python -m effscale.experiments.random_ltd_vit"
        config = parse(PRESETS, __doc__ or "", argv, name=name)
        keep_freed_memory()
        run(config)


if __name__ == "__main__":
    main()
