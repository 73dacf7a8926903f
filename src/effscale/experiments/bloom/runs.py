"""The runs of a seed: pretraining, and fine-tuning on prompted tasks; each leaves a model folder."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import grain
import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from effscale.data import batch_rows, make_dataset, packed_rows
from effscale.experiments.bloom.config import Config
from effscale.experiments.bloom.corpus import Prepared
from effscale.experiments.bloom.tasks import Accuracy, Tasks, evaluate_tasks
from effscale.experiments.shared.runs import once, train_to_end
from effscale.interop import load_pretrained, save_pretrained
from effscale.models import Transformer
from effscale.parallel import batch_shard, shard_batch, shardings
from effscale.rlhf.data import RecordEncoder, fine_tuning_rows
from effscale.training import (
    AdamWConfig,
    Clip,
    KeepBest,
    RunFolder,
    StagedStep,
    TrainState,
    create_train_state,
    evaluate,
    make_eval_step,
    make_train_step,
    next_token_loss,
    resize_rows,
)
from effscale.training.serialize import write_json

_EVAL_STEP = jax.jit(make_eval_step(next_token_loss))
CHOSEN_BY = 16
"""Validation examples of a cell by which a checkpoint of fine-tuning is chosen."""


class Runs:
    """Both runs of one seed.

    Args:
        config: What the experiment was told.
        folder: The run folder.
        mesh: The devices.
        seed: Decides what is random.
        prepared: The corpus.
        tasks: The tasks.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        mesh: jax.sharding.Mesh,
        seed: int,
        prepared: Prepared,
        tasks: Tasks,
    ):
        self.config, self.folder, self.mesh, self.seed = config, folder, mesh, seed
        self.prepared, self.tasks = prepared, tasks
        self.stop_id = next(iter(prepared.corpora.values())).eos_id

    def place(self, name: str) -> pathlib.Path:
        """The folder of a run."""
        return self.folder.path / f"seed-{self.seed}" / name

    def run(self) -> None:
        """Makes both runs, goes on with one that was stopped, or leaves finished ones as they are.

        Raises:
            StoppedBySignal: After SIGTERM or Ctrl-C, when all is saved.
        """
        once(self.folder, f"seed-{self.seed}/pretrain", self._pretrain)
        once(self.folder, f"seed-{self.seed}/finetune", self._finetune)

    def _pretrain(self) -> None:
        config, how = self.config, self.config.pretrain
        ramp = how.ramp()
        optimizer = self._adam(config.weight_decay).build(how.schedule(config.length).build())
        step = make_train_step(
            next_token_loss,
            optimizer,
            accumulate=how.accumulate,
            clip=Clip(config.clip_norm),
        )
        place = functools.partial(shard_batch, mesh=self.mesh)
        staged = lambda: StagedStep(step, ramp, resize_rows, place_batch=place)
        first = staged()
        model = config.model.build(self.prepared.tokenizer.get_vocab_size())

        def create() -> TrainState:
            fresh = Transformer(model, rngs=nnx.Rngs(self.seed))
            return create_train_state(fresh, optimizer, key=jax.random.key(self.seed))

        stores = [corpus.train for corpus in self.prepared.corpora.values()]
        weights = [self.prepared.weights[name] for name in self.prepared.corpora]
        # As BLOOM: documents follow each other in a row, and attention does not stop between them.
        rows = packed_rows(
            stores, length=config.length, seed=self.seed, weights=weights, cross_document=True
        )
        try:
            state = train_to_end(
                self.folder,
                f"seed-{self.seed}/pretrain",
                first,
                self._batches(rows, ramp),
                create=create,
                num_steps=how.steps,
                evaluate=lambda state: {"val_loss": self._validate(state.model)["all"]},
                every=config.checkpoint_every,
                restage=staged,
                layout=shardings(jax.eval_shape(create), self.mesh),
                place_batch=place,
            )
        finally:
            first.close()
        losses = self._validate(state.model)
        found = self._judge(state.model, "test", config.eval_examples)
        self._leave("pretrain", state.model, {"val_loss": losses, "accuracy": found})

    def _finetune(self) -> None:
        config, how = self.config, self.config.finetune
        base = self.place("pretrain") / "model"
        encoder = RecordEncoder(
            tokenizer=self.prepared.tokenizer, end_id=self.stop_id, format="deepspeed_chat"
        )
        packed = fine_tuning_rows(
            self.tasks.records(self.seed), encoder, length=config.length, weigh="record"
        )
        count = len(packed["input_ids"])
        if count < how.batch_size:
            raise ValueError(
                f"the tasks make {count} packed rows, fewer than finetune.batch_size={how.batch_size}"
            )
        rows = grain.MapDataset.range(count).map(
            lambda i: {name: array[i] for name, array in packed.items()}
        )
        rows = rows.shuffle(seed=self.seed).repeat(None)
        optimizer = self._adam(how.weight_decay).build(how.learning_rate)
        step = make_train_step(next_token_loss, optimizer, clip=Clip(config.clip_norm))
        best = KeepBest(self.place("finetune") / "best")

        def create() -> TrainState:
            model = load_pretrained(base, dtype="float32", mesh=self.mesh)
            return create_train_state(model, optimizer, key=jax.random.key(self.seed))

        def look(state: TrainState) -> Mapping[str, float]:
            found = self._judge(state.model, "validation", CHOSEN_BY)
            new = [each.median for each in found if each.cell.group != "learned"]
            value = float(np.mean(new)) if new else 0.0
            best.offer(int(state.step), state.model, value)
            return {"validation_accuracy": value}

        state = train_to_end(
            self.folder,
            f"seed-{self.seed}/finetune",
            jax.jit(step, donate_argnums=0),
            self._batches(rows, how.batch_size),
            create=create,
            trace_create=False,  # weights of a file are no part of a program
            num_steps=how.steps,
            evaluate=look,
            every=how.eval_every,
            place_batch=functools.partial(shard_batch, mesh=self.mesh),
        )
        chosen = best.restore(state.model)
        accuracy = self._judge(chosen.model, "test", config.eval_examples)
        losses = self._validate(chosen.model)
        told = {"val_loss": losses, "accuracy": accuracy, "step": chosen.step}
        self._leave("finetune", chosen.model, told)

    def _adam(self, weight_decay: float) -> AdamWConfig:
        return AdamWConfig(b2=self.config.b2, weight_decay=weight_decay)

    def _batches(self, rows: grain.MapDataset, sizes: Any) -> Any:
        part = batch_shard(self.mesh)
        options = {"process_index": part.index, "process_count": part.count}
        return iter(batch_rows(rows, batch_size=sizes, **options))

    def _validate(self, model: Transformer) -> dict[str, float]:
        """The loss on the held-out text of each component, in nats a token, and under ``all`` their mean by the mixture's weights."""
        part = batch_shard(self.mesh)
        losses = {}
        for name, corpus in self.prepared.corpora.items():
            batches = make_dataset(
                corpus.validation,
                batch_size=self.config.pretrain.batch_size,
                length=self.config.length,
                shuffle=False,
                num_epochs=1,
                remainder="pad",
                cross_document=True,
                process_index=part.index,
                process_count=part.count,
            )
            place = functools.partial(shard_batch, mesh=self.mesh)
            losses[name] = evaluate(model, _EVAL_STEP, batches, place_batch=place)["loss"]
        weights = self.prepared.weights
        return losses | {"all": sum(weights[name] * loss for name, loss in losses.items())}

    def _judge(self, model: Transformer, split: Any, count: int) -> list[Accuracy]:
        if jax.process_count() > 1:
            # Every process judges a whole copy; they come to the same.
            model = multihost_utils.process_allgather(model, tiled=True)
        return evaluate_tasks(
            self.tasks,
            list(self.tasks.cells()),
            model,
            self.prepared.tokenizer,
            split=split,
            count=count,
            start_id=self.stop_id,
            batch_size=self.config.eval_batch,
        )

    def _leave(self, name: str, model: Transformer, told: Mapping[str, Any]) -> None:
        """The model as a folder, and what was found about it."""
        save_pretrained(model, self.place(name) / "model", tokenizer=self.prepared.tokenizer)
        if jax.process_index() == 0:
            plain = {**told, "accuracy": [_plain(each) for each in told["accuracy"]]}
            write_json(self.place(name) / "found.json", plain)


def _plain(found: Accuracy) -> dict[str, Any]:
    cell = found.cell
    return {
        "task": cell.task,
        "language": cell.language,
        "group": cell.group,
        "templates": dict(found.of_template),
        "median": found.median,
        "chance": found.chance,
    }
