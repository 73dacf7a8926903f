"""The runs of the experiment ``xtc``: one per arm, budget, learning rate and seed."""

import functools
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effscale.experiments.shared.classifier.batches import (
    Texts,
    TrainingBatches,
    evaluation_batches,
)
from effscale.experiments.shared.runs import once, train_to_end
from effscale.experiments.xtc.arms import Arm
from effscale.experiments.xtc.passages import Passages
from effscale.models import Transformer
from effscale.quant import model_size
from effscale.training import (
    KeepBest,
    RunFolder,
    ShapeBuckets,
    TrainingDivergedError,
    TrainState,
    create_train_state,
    read_jsonl,
)
from effscale.training.plotting import series
from effscale.training.serialize import write_json

EVALUATION_BATCH = 50
"""Passages per evaluation batch."""

UNTRAINED = 0
"""The budget of a model that is evaluated before training."""


class Runner:
    """An arm's runs, compiled once for all of them.

    Args:
        arm: The arm.
        data: The passages.
        folder: The run folder, in which each run gets its own folder.
        origin: The ``origin`` argument of ``Arm.begin``, by seed.
        teacher: The teacher, by seed; None if the arm learns from labels.
    """

    def __init__(
        self,
        arm: Arm,
        data: Passages,
        folder: RunFolder,
        *,
        origin: Callable[[int], Transformer],
        teacher: Callable[[int], Transformer] | None,
    ):
        self.arm, self.data, self.folder = arm, data, folder
        self.origin, self.teacher = origin, teacher
        self.train_step = ShapeBuckets(arm.train_step(), donate_argnums=0)
        self.rates: dict[int, float] = {}

    def search(self) -> dict[int, dict[float, float]]:
        """Try all learning rates at all budgets with seed 0, and choose the best for each; finished runs are not
        repeated.

        Returns:
            For each budget and learning rate, the best accuracy on the dev passages.

        Raises:
            StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
        """
        found = {}
        for steps in self.arm.budgets:
            tried = {rate: self._run(steps, rate, 0) for rate in self.arm.config.rates}
            self.rates[steps] = max(tried, key=lambda rate: tried[rate])
            for rate in tried.keys() - {self.rates[steps]}:
                self._forget(steps, rate, 0)
            found[steps] = tried
        return found

    def run(self, seed: int) -> dict[int, dict[str, float]]:
        """Make the runs of a seed with the learning rates that the search found, and evaluate them on the test
        passages.

        Returns:
            For each budget, and for the model before training, the results: ``test_accuracy`` and, for quantized
            arms, those of the packed model.

        Raises:
            StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
        """
        found = {}
        if self.teacher is not None:
            name = f"{self.arm.name}/untrained/seed-{seed}"
            found[UNTRAINED] = self._measured(name, lambda: self._begin(seed))
        for steps in self.arm.budgets:
            rate = self.rates[steps]
            self._run(steps, rate, seed)
            name = f"{self._name(steps, rate, seed)}/test"
            found[steps] = self._measured(name, functools.partial(self._best, steps, rate, seed))
            if steps != self.arm.budgets[-1]:
                self._forget(steps, rate, seed)
        return found

    def model(self, seed: int) -> Transformer:
        """Load the best model of a seed's longest run."""
        steps = self.arm.budgets[-1]
        return self._best(steps, self.rates[steps], seed)

    def _name(self, steps: int, rate: float, seed: int) -> str:
        return f"{self.arm.name}/steps-{steps}/rate-{rate:g}/seed-{seed}"

    def _kept(self, steps: int, rate: float, seed: int) -> KeepBest:
        return KeepBest(self.folder.path / self._name(steps, rate, seed) / "best")

    def _forget(self, steps: int, rate: float, seed: int) -> None:
        """Delete a run's model, which is no longer needed."""
        place = self.folder.path / self._name(steps, rate, seed) / "best"
        shutil.rmtree(place, ignore_errors=True)

    def _begin(self, seed: int) -> Transformer:
        return self.arm.begin(self.origin(seed))

    def _best(self, steps: int, rate: float, seed: int) -> Transformer:
        wanted = jax.eval_shape(functools.partial(self._begin, seed))
        return self._kept(steps, rate, seed).restore(wanted).model

    def _run(self, steps: int, rate: float, seed: int) -> float:
        """Make a run unless it exists, and return its best accuracy on the dev passages; 0 if it diverged before the first evaluation."""
        name, config = self._name(steps, rate, seed), self.arm.config
        kept = self._kept(steps, rate, seed)

        def create() -> TrainState:
            # The step donates its arrays, and the teacher's are needed again.
            model = jax.tree.map(jnp.copy, self._begin(seed))
            return create_train_state(
                model, self.arm.optimizer(rate, steps), key=jax.random.key(seed)
            )

        def on_dev(state: TrainState) -> Mapping[str, float]:
            logits, labels = _logits(state.model, self.data.dev)
            accuracy = _accuracy(logits, labels)
            kept.offer(int(state.step), state.model, accuracy)
            return {"dev_loss": _cross_entropy(logits, labels), "dev_accuracy": accuracy}

        def train() -> None:
            try:
                train_to_end(
                    self.folder,
                    name,
                    self.train_step,
                    TrainingBatches(self.data.train, batch_size=config.batch_size, seed=seed),
                    create=create,
                    num_steps=steps,
                    evaluate=on_dev,
                    every=-(-steps // config.evaluations),
                    frozen=None if self.teacher is None else self.teacher(seed),
                )
            except TrainingDivergedError as error:  # the best checkpoint before counts
                print(f"{name} diverged at step {error.step}", file=sys.stderr)

        once(self.folder, name, train)
        records = read_jsonl(self.folder.path / name / "metrics.jsonl")
        return float(series(records, "dev_accuracy")[1].max(initial=0.0))

    def _measured(self, name: str, model: Callable[[], Transformer]) -> dict[str, float]:
        """Evaluate a model on the test passages, once."""
        file = self.folder.path / name / "measured.json"

        def measure() -> None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, measure_model(self.arm, model(), self.data.test))

        once(self.folder, name, measure)
        return json.loads(file.read_text(encoding="utf-8"))


def measure_model(arm: Arm, model: Transformer, test: Texts) -> dict[str, float]:
    """Measure accuracy and size of a model as it is stored; for a quantized arm, of the packed model.

    Args:
        arm: The arm of the model.
        model: The trained model.
        test: The test passages.

    Returns:
        ``test_accuracy``, and the bytes of ``model_size``. For a quantized arm also ``trained_accuracy``, that of the
        fake-quantized model; ``agreement``, the share of passages on which the two give the same answer; and
        ``logit_difference``, the largest difference of their logits relative to the largest logit.
    """
    packed = arm.packed(model)
    logits, labels = _logits(packed, test)
    size = model_size(packed)
    found = {
        "test_accuracy": _accuracy(logits, labels),
        "total_bytes": size.total,
        "code_bytes": size.codes,
    }
    if arm.recipe is not None:
        trained, _ = _logits(model, test)
        found |= {
            "trained_accuracy": _accuracy(trained, labels),
            "agreement": float((trained.argmax(-1) == logits.argmax(-1)).mean()),
            "logit_difference": float(np.abs(trained - logits).max() / np.abs(trained).max()),
        }
    return found


@jax.jit
def _predict(model: Transformer, batch: Any) -> jax.Array:
    mask = batch["attention_mask"]
    return model(batch["input_ids"], attention_mask=mask)["classes"].astype(jnp.float32)


def _logits(model: Transformer, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits of all texts, and their labels in the same order."""
    logits, labels = [], []
    for batch in evaluation_batches(texts, min(EVALUATION_BATCH, len(texts))):
        real = batch["weights"] > 0
        logits.append(np.asarray(_predict(model, batch))[real])
        labels.append(batch["labels"][real])
    return np.concatenate(logits), np.concatenate(labels)


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float((logits.argmax(-1) == labels).mean())


def _cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean over rows, in float64."""
    shifted = logits.astype(float) - logits.max(-1, keepdims=True)
    right = np.take_along_axis(shifted, labels[:, None], 1)[:, 0]
    return float((np.log(np.exp(shifted).sum(-1)) - right).mean())
