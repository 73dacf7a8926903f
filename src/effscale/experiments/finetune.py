"""Fine-tune pretrained text and image models in JAX and in PyTorch with the same recipe.

MiniLM, a BERT with 6 layers, learns the sentiment of 600 drug reviews; a ViT-S/14 learns scikit-learn's digits and
part of Fashion-MNIST. Each gets a new head. For each task, an arm in transformers and torch starts from the same files,
with the same head, batches and learning rates, and the accuracies are compared.

    python -m effscale.experiments.finetune
    python -m effscale.experiments.finetune --arms reviews --seeds 5 --reviews.epochs 6
    python -m effscale.experiments.finetune --out runs/mine --resume

``--arms reviews digits fashion`` needs no PyTorch. ``make assets`` installs models and reviews; Debian's package
dataset-fashion-mnist installs Fashion-MNIST.

References:
    Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding" (2018), appendix
        A.3. https://arxiv.org/abs/1810.04805
    Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale" (2020), table 4.
        https://arxiv.org/abs/2010.11929
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

import jax
import numpy as np

from effscale.command.terminal import status
from effscale.experiments.shared.classifier import torch_twin
from effscale.experiments.shared.classifier.batches import (
    Batch,
    TrainingBatches,
    evaluation_batches,
)
from effscale.experiments.shared.classifier.model import class_loss, classifier
from effscale.experiments.shared.classifier.problem import Problem, prepare_images, prepare_reviews
from effscale.experiments.shared.classifier.recipe import Recipe
from effscale.experiments.shared.config_parts import ImagePart
from effscale.options import Bounds
from effscale.run import Run
from effscale.study import Arm, Curves, Results, Study, Trial, command
from effscale.study.folder import StudyPart
from effscale.training import (
    AdamWConfig,
    Clip,
    ScheduleConfig,
    TrainState,
    evaluate,
    make_eval_step,
)
from effscale.training.plotting import curves_of, records_of

Task = Literal["reviews", "digits", "fashion"]
ArmName = Literal["reviews", "reviews_torch", "digits", "digits_torch", "fashion", "fashion_torch"]
TASKS: tuple[Task, ...] = get_args(Task)
ARMS: tuple[ArmName, ...] = get_args(ArmName)
OPTIMIZER = AdamWConfig(b2=0.999, weight_decay=0.01)
CLIP_NORM = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StudyPart, ImagePart):
    """Options of the study; every field is a command-line option."""

    arms: tuple[ArmName, ...] | None = None
    """The arms to train, each a task here or in PyTorch; None trains all."""
    reviews: Recipe = Recipe()
    """Drug reviews with MiniLM; 600 training and 379 test examples exist."""
    digits: Recipe = Recipe(learning_rate=3e-5, test=500)
    """Digits with the ViT; 1,797 examples exist, including the test examples."""
    fashion: Recipe = Recipe(epochs=2, learning_rate=3e-5, train=2000, test=1000)
    """Fashion-MNIST with the ViT; 60,000 training and 10,000 test examples exist."""
    max_length: Annotated[int, Bounds(at_least=4)] = 128
    """Maximum number of tokens per review; longer reviews are truncated."""
    dropout: bool = False
    """Use the dropout rates of the model's config. PyTorch draws dropout from another generator, so the curves then differ more."""
    text_model: pathlib.Path | None = None
    """Folder of a BERT to use instead of MiniLM."""


PRESETS = {
    "smoke": Config(
        arms=("reviews", "digits"),
        seeds=1,
        reviews=Recipe(epochs=1, train=64, test=32),
        digits=Recipe(epochs=1, learning_rate=3e-5, train=64, test=32),
        max_length=32,
        image_size=28,
    ),
    "default": Config(),
    # BERT, appendix A.3: 3 epochs, batches of 32, 5e-5, dropout 0.1, up to 512 tokens. ViT, table 4: batches of 512, 500
    # steps on small sets and 10,000 on such as CIFAR; theirs are of SGD, these of AdamW as all else here.
    "paper": Config(
        reviews=Recipe(epochs=3, batch_size=32, learning_rate=5e-5),
        digits=Recipe(epochs=250, batch_size=512, learning_rate=5e-5, test=500),
        fashion=Recipe(epochs=86, batch_size=512, learning_rate=5e-5),
        max_length=512,
        image_size=224,
        dropout=True,
    ),
}


def prepare(config: Config, task: Task) -> Problem:
    """Read the examples and the pretrained model of a task."""
    if task == "reviews":
        return prepare_reviews(config.reviews, config.max_length, config.text_model)
    return prepare_images(task, getattr(config, task), config)


def run(config: Config, recipe: Recipe, num_steps: int, model: Any) -> Run:
    """Return the run of a task without its data: a model with a head, or a function that creates it, and its recipe."""
    rate = ScheduleConfig(
        kind="linear",
        peak=recipe.learning_rate,
        warmup=int(0.1 * num_steps),
        total=num_steps,
    )
    return Run(
        model=model,
        loss=class_loss if config.dropout else lambda model, batch, key: class_loss(model, batch),
        optimizer=OPTIMIZER,
        learning_rate=rate.build(),
        clip=Clip(CLIP_NORM),
        num_steps=num_steps,
    )


class Libraries:
    """A task in both libraries: the same head, batches and learning rates.

    Args:
        config: Config of the experiment.
        problem: The task.
    """

    def __init__(self, config: Config, problem: Problem):
        self.config, self.problem = config, problem
        classes = problem.data.num_classes
        eval_step = jax.jit(make_eval_step(class_loss))

        def test(state: TrainState) -> dict[str, float]:
            means = evaluate(state.model, eval_step, self.test_batches(), prefix="test_")
            return {name: means[name] for name in ("test_loss", "test_accuracy")}

        self.head = lambda seed: classifier(problem.model, classes, seed)
        self.run = dataclasses.replace(
            run(config, problem.recipe, problem.steps, self.head),
            data=self.training_batches,
            evaluation=test,
            eval_every=problem.per_epoch,
            checkpoint_every=problem.per_epoch,
        )

    def training_batches(self, seed: int) -> TrainingBatches:
        """Return the training batches of a seed."""
        size = self.problem.recipe.batch_size
        return TrainingBatches(self.problem.data.train, batch_size=size, seed=seed)

    def test_batches(self) -> Iterator[Batch]:
        """Return the test batches."""
        return evaluation_batches(self.problem.data.test, self.problem.recipe.batch_size)

    def effscale(self, trial: Trial) -> dict[str, Any]:
        """Train here."""
        return self._costs(trial.fit(self.run))

    def torch(self, trial: Trial) -> dict[str, Any]:
        """Train in PyTorch."""
        dense, rate = self.head(trial.seed).heads["classes"].dense, self.run.schedule
        assert rate is not None
        images = self.problem.task != "reviews"
        twin = torch_twin.Twin(
            folder=self.problem.folder,
            image_size=self.config.image_size if images else None,
            kernel=jax.device_get(dense.kernel.get_value()),
            bias=jax.device_get(dense.bias.get_value()),
            optimizer=OPTIMIZER,
            clip_norm=CLIP_NORM,
            rates=[float(rate(step)) for step in range(self.problem.steps)],
            dropout=self.config.dropout,
            seed=trial.seed,
        )
        torch_twin.train(twin, self.training_batches(trial.seed), self.test_batches, trial)
        last = records_of(trial.place)[-1]
        return self._costs({"updates": self.problem.steps, "test_accuracy": last["test_accuracy"]})

    def _costs(self, metrics: dict[str, Any]) -> dict[str, Any]:
        own = {"accuracy": metrics["test_accuracy"], "epochs": self.problem.recipe.epochs}
        return metrics | own


def loss_gaps(results: Results, task: Task, per_epoch: int) -> dict[str, float]:
    """Return ``|loss - PyTorch's loss|`` in training: the largest at the first step, and the median over the first epoch."""
    names = (task, f"{task}_torch")
    if not set(names) <= set(results.study.arms):
        return {}
    ours, theirs = (curves_of(results.records(name), "loss")[1] for name in names)
    gaps = np.abs(ours - theirs)
    return {
        f"{task}_loss_gap_first_step": float(gaps[:, 0].max()),
        f"{task}_loss_gap_first_epoch": float(np.median(gaps[:, :per_epoch])),
    }


def study(config: Config) -> Study:
    """Return the comparison."""
    wanted = ARMS if config.arms is None else config.arms
    if any(name.endswith("_torch") for name in wanted):
        torch_twin.require()
    with status("reading data and models"):
        tasks = [t for t in TASKS if t in wanted or f"{t}_torch" in wanted]
        problems = {task: prepare(config, task) for task in tasks}
    arms: dict[str, Arm] = {}
    for task, problem in problems.items():
        both = Libraries(config, problem)
        theirs = f"{task}_torch"
        arms[task] = Arm(about=f"{task}, effscale", train=both.effscale, against=theirs)
        # Compared with nothing: it is what the arm before it is compared with.
        arms[theirs] = Arm(about=f"{task}, PyTorch", train=both.torch, against=theirs)

    def figures(results: Results) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for task, problem in problems.items():
            found[f"{task}_majority"] = problem.data.majority
            found[f"{task}_test_size"] = len(problem.data.test)
            found |= loss_gaps(results, task, problem.per_epoch)
        return found

    accuracy = Curves(
        name="accuracy",
        metric="test_accuracy",
        over="epochs",
        labels=("epochs", "test accuracy"),
    )
    gaps = Curves(
        name="loss_difference",
        metric="loss",
        over="epochs",
        minus=True,
        labels=("epochs", "training loss minus PyTorch's (nats)"),
    )
    compared = any(task in wanted and f"{task}_torch" in wanted for task in tasks)
    return Study(
        name="finetune",
        data={task: problem.digests() for task, problem in problems.items()},
        arms=arms,
        baseline=next(iter(arms), ""),
        metric="accuracy",
        columns={"updates": "updates", "cpu_seconds": "processor seconds"},
        plots=(accuracy, gaps) if compared else (accuracy,),
        figures=figures,
    )


main = functools.partial(command.main, PRESETS, study, __doc__ or "")

if __name__ == "__main__":
    main()
