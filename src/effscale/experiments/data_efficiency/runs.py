"""The runs of the experiment ``data_efficiency``: one per technique, fraction of the budget and seed."""

import gc
import json

import jax

from effscale.data import Corpus
from effscale.experiments.data_efficiency.config import Config
from effscale.experiments.shared.pretraining import Pretraining
from effscale.experiments.shared.pretraining_config import FREE
from effscale.experiments.shared.pretraining_plan import Technique
from effscale.experiments.shared.pretraining_run import pretrain_once
from effscale.study.search import Found, Point
from effscale.training import RunFolder, TrainState


class Runner:
    """Makes one run after another; programs compiled for a technique and fraction are used for all seeds.

    Args:
        config: Config of the experiment.
        corpus: The prepared corpus.
        mesh: The device mesh.

    Raises:
        ValueError: There is too little text.
    """

    def __init__(self, config: Config, corpus: Corpus, mesh: jax.sharding.Mesh):
        self.config, self.corpus, self.mesh = config, corpus, mesh
        self._trainings = {
            (technique, fraction): Pretraining(
                config.pretraining(technique, fraction), corpus.vocab_size, mesh
            )
            for technique in config.techniques
            for fraction in config.fractions
        }
        for training in self._trainings.values():
            training.batches([corpus.train], seed=0)
        self._held_out = training.held_out([corpus.validation])

    def search(self, folder: RunFolder, technique: Technique) -> Found:
        """Search for a technique's learning rate and warmup on the whole budget; finished runs are not repeated.

        Raises:
            StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
        """

        def loss_of(point: Point) -> float:
            name = f"search/{technique}/{point.name}"
            self._once(folder, name, technique, 1.0, self.config.search.seed, point)
            loss = json.loads((folder.path / name / "final.json").read_text())["val_loss"]
            return float("inf") if loss is None else loss

        return self.config.search.climb(self.config.start, loss_of, steps=self.config.steps)

    def run(
        self, folder: RunFolder, technique: Technique, fraction: float, seed: int, point: Point
    ) -> None:
        """Start a run, resume one that was stopped, or skip a finished one. A run that diverges counts as finished.

        Raises:
            StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
        """
        self._once(folder, run_name(technique, fraction, seed), technique, fraction, seed, point)

    def _once(
        self,
        folder: RunFolder,
        name: str,
        technique: Technique,
        fraction: float,
        seed: int,
        point: Point,
    ) -> None:
        training = self._trainings[technique, fraction]
        config = self.config.pretraining(technique, fraction, seed, point)

        def measure(state: TrainState) -> dict[str, float]:
            loss = training.validate(state, self._held_out, config.eval_batches)
            return loss | training.plan.consumed(int(state.step))

        pretrain_once(
            *(folder, name, training, config),
            batches=lambda: training.batches([self.corpus.train], seed=seed),
            evaluate=measure,
            final=lambda trained: {
                "val_loss": training.validate(trained.state, self._held_out)["val_loss"],
                "num_compilations": len(trained.compilations),
            },
            diverged={"val_loss": None, "diverged": True},
            # Older checkpoints contain the quickstart's prompts as well.
            free_fields=(*FREE, "samples", "sample_tokens"),
            compile_first=True,
        )

    def forget(self, technique: Technique, fraction: float) -> None:
        """Release compiled programs when all seeds are done.

        A compiled step uses hundreds of memory maps, and Linux limits a process to 65,530: too few for all
        techniques, fractions and shapes at the same time.
        """
        del self._trainings[technique, fraction]
        gc.collect()


def run_name(technique: Technique, fraction: float, seed: int) -> str:
    """Return the name of a run's folder inside the run folder."""
    return f"{technique}/fraction-{fraction:g}/seed-{seed}"
