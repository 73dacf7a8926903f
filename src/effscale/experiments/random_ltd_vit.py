"""Fine-tune a pretrained ViT on images with and without random-LTD, with the same recipe and number of steps.

With random-LTD, all layers except the first and the last process part of an image's tokens at first, and all of them
after most of the steps. Both arms get the same images in the same order. The experiment measures whether the accuracy
is the same, and what is saved.

    python -m effscale.experiments.random_ltd_vit
    python -m effscale.experiments.random_ltd_vit --task digits --seeds 5
    python -m effscale.experiments.random_ltd_vit --out runs/mine --resume

``make assets`` installs the model; Debian's package dataset-fashion-mnist installs Fashion-MNIST.

References:
    Yao et al., "Random-LTD: Random and Layerwise Token Dropping Brings Efficient Training for Large-Scale Transformers"
        (2022). https://arxiv.org/abs/2211.11586
"""

import dataclasses
import functools
import itertools
from typing import Any, Literal

import jax
from flax import nnx

from effscale.experiments.shared.classifier.batches import TrainingBatches, evaluation_batches
from effscale.experiments.shared.classifier.model import class_loss, classifier, classifier_config
from effscale.experiments.shared.classifier.problem import Problem, prepare_images
from effscale.experiments.shared.classifier.recipe import Recipe
from effscale.experiments.shared.config_parts import ImagePart
from effscale.experiments.shared.dropping import ARMS, COLUMNS, Dropping, Plan, compared
from effscale.models import PatchInputs, Transformer, TransformerConfig
from effscale.options import PositiveInt
from effscale.run import Run
from effscale.study import Arm, Curves, Finals, Study, Trial, command
from effscale.study.folder import StudyPart
from effscale.training import AdamWConfig, Clip, TrainState, evaluate, make_eval_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StudyPart, ImagePart):
    """Options of the study; every field is a command-line option."""

    task: Literal["fashion", "digits"] = "fashion"
    """The task: Fashion-MNIST, or scikit-learn's digits."""
    fashion: Recipe = Recipe(epochs=1, learning_rate=3e-5, train=1600, test=1000)
    """Fashion-MNIST; 60,000 training and 10,000 test images exist."""
    digits: Recipe = Recipe(epochs=1, learning_rate=3e-5, test=500)
    """Digits; 1,797 images exist, including the test images."""
    image_size: int = 98
    """Height and width to which images are resized, a multiple of the ViT's patch size of 14; 98 gives 50 tokens."""
    ltd: Dropping = Dropping(min_value=8, seq_per_step=8, share=0.8)
    """Schedule of random-LTD."""
    eval_every: PositiveInt = 25
    """Steps between evaluations on part of the test images, and between checkpoints; the last evaluation is on all of them."""
    eval_batches: PositiveInt = 12
    """Number of batches in that part."""

    @property
    def recipe(self) -> Recipe:
        """The recipe of the task."""
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


def plan(config: Config, arm: str, model: TransformerConfig, num_steps: int) -> Plan:
    """Return the tokens that the layers of an arm process."""
    assert isinstance(model.inputs, PatchInputs)
    return Plan(
        arm=arm,
        model=model,
        dropping=config.ltd,
        length=model.inputs.num_tokens,
        batch_size=config.recipe.batch_size,
        num_steps=num_steps,
    )


def run(config: Config, plan: Plan, problem: Problem | None = None) -> Run:
    """Return the run of an arm; without a problem only to be lowered, with random weights."""
    rate = plan.rate(config.recipe.learning_rate, warmup=round(0.1 * plan.num_steps))
    described = plan.run(
        Run(
            model=lambda key: Transformer(plan.model, rngs=nnx.Rngs(key)),
            loss=class_loss,
            clip=Clip(1.0),
            num_steps=plan.num_steps,
            eval_every=config.eval_every,
            checkpoint_every=config.eval_every,
        ),
        AdamWConfig(b2=0.999, weight_decay=0.01),
        rate,
    )
    if problem is None:
        return described
    data, rows = problem.data, config.recipe.batch_size
    eval_step = jax.jit(make_eval_step(class_loss))

    def accuracy(state: TrainState) -> dict[str, float]:
        def means(batches: int | None) -> dict[str, float]:
            part = itertools.islice(evaluation_batches(data.test, rows), batches)
            return evaluate(state.model, eval_step, part)

        values = {"part_test_accuracy": means(config.eval_batches)["accuracy"]}
        if int(state.step) < plan.num_steps:
            return values
        last = means(None)
        return values | {f"test_{name}": last[name] for name in ("loss", "accuracy")}

    return dataclasses.replace(
        described,
        model=lambda key: classifier(problem.model, data.num_classes, key),
        data=lambda seed: TrainingBatches(data.train, batch_size=rows, seed=seed),
        evaluation=accuracy,
    )


def study(config: Config) -> Study:
    """Return the comparison."""
    problem = prepare_images(config.task, config.recipe, config)
    model = classifier_config(problem.model.config, problem.data.num_classes)

    def arm(name: str) -> Arm:
        seen = plan(config, name, model, problem.steps)
        trained = run(config, seen, problem)

        def train(trial: Trial) -> dict[str, Any]:
            metrics = trial.fit(trained)
            return {**metrics, "accuracy": metrics["test_accuracy"], **seen.costs}

        return Arm(about=ARMS[name], train=train)

    return Study(
        name="random_ltd_vit",
        data={config.task: problem.digests()},
        arms={name: arm(name) for name in ARMS},
        baseline="baseline",
        metric="accuracy",
        columns=COLUMNS,
        plots=(
            Curves(
                name="accuracy",
                metric="part_test_accuracy",
                over="tokens",
                labels=("layer tokens", f"test accuracy on {config.task} (part of the images)"),
            ),
            Finals(name="final_accuracy", label=f"test accuracy on {config.task}"),
        ),
        figures=lambda results: {
            "majority": problem.data.majority,
            "test_size": len(problem.data.test),
            "steps": problem.steps,
            **compared(results, "accuracy"),
        },
    )


main = functools.partial(command.main, PRESETS, study, __doc__ or "")

if __name__ == "__main__":
    main()
