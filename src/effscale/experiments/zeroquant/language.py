"""The language model of the experiment ``zeroquant``: its losses on two texts, for each arm."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effscale.data.sources import StandardLibrary
from effscale.experiments.shared import assets
from effscale.experiments.shared.runs import once
from effscale.experiments.zeroquant import peers
from effscale.experiments.zeroquant.arms import Calibration, make_arms, quantized
from effscale.experiments.zeroquant.config import Config
from effscale.interop import load_pretrained, load_tokenizer
from effscale.models import TokenInputs, Transformer, take_layers
from effscale.quant import sensitivity
from effscale.training import RunFolder
from effscale.training.serialize import write_json

TEXTS = ("wiki", "python")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageProblem:
    """A causal model with the texts for evaluation and calibration.

    Attributes:
        source: The folder or file of the model.
        model: The model.
        vocabulary: Vocabulary size.
        tests: Token ids of shape ``(rows, length)`` by text.
        calibration: Token ids of shape ``(calibration_rows, calibration_length)``.
    """

    source: pathlib.Path
    model: Transformer
    vocabulary: int
    tests: Mapping[str, Int[np.ndarray, "rows length"]]
    calibration: Int[np.ndarray, "rows length"]


def prepare(config: Config) -> LanguageProblem:
    """Read the model and the texts.

    Args:
        config: Config of the experiment.
    """
    source = config.language_model or assets.smollm2_file()
    tokenizer = load_tokenizer(source)
    encode = lambda text: tokenizer.encode(text).ids
    model = load_pretrained(source)
    inputs = model.config.inputs
    if not isinstance(inputs, TokenInputs) or not model.config.causal:
        raise ValueError(f"language_model must be a causal language model, got {str(source)!r}")
    if config.layers is not None:
        model = take_layers(model, range(min(config.layers, model.config.num_layers)))
    texts = {
        "wiki": assets.wikipedia_articles(),
        "python": (document.text for document in StandardLibrary().documents()),
    }
    return LanguageProblem(
        source=source,
        model=model,
        vocabulary=inputs.vocab_size,
        tests={name: _rows(map(encode, texts[name]), config.rows, config.length) for name in TEXTS},
        calibration=_rows(
            map(encode, assets.c4_pages()), config.calibration_rows, config.calibration_length
        ),
    )


def _rows(documents: Iterable[list[int]], rows: int, length: int) -> Int[np.ndarray, "rows length"]:
    """Concatenate documents and split them into rows; each document provides at most an eighth of them, so that none dominates."""
    most = max(rows * length // 8, length)
    ids = itertools.chain.from_iterable(document[:most] for document in documents)
    found = np.fromiter(itertools.islice(ids, rows * length), np.int32)
    if len(found) < rows * length:
        raise ValueError(
            f"the text has {len(found):,} tokens, too few for {rows} rows of {length}. Use fewer or shorter rows"
        )
    return found.reshape(rows, length)


class LanguageRuns:
    """Evaluates a language model with each arm.

    Args:
        problem: The model and its texts.
        config: Config of the experiment.
        folder: The run folder; each arm has a folder in it.
    """

    def __init__(self, problem: LanguageProblem, config: Config, folder: RunFolder):
        self.problem, self.config, self.folder = problem, config, folder
        self.arms = make_arms(config.group_size)
        others = (*peers.QWIX, *peers.TORCH) if config.peers else ()
        self.names = ("float32", *config.arms, *others)

    def run(self) -> None:
        """Run every arm and peer that is not done yet, and measure the sensitivity of each layer."""
        for name in self.names:
            self._once(name, lambda name=name: self._losses(name))
        self._once("sensitivity", self._sensitivity)

    def found(self, name: str) -> Any:
        """Return the results of ``run`` for an arm or peer, or for the layers' ``sensitivity``."""
        return json.loads(self._file(name).read_text(encoding="utf-8"))

    def _once(self, name: str, make: Callable[[], Any]) -> None:
        file = self._file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        once(self.folder, f"smollm2/{name}", lambda: write_json(file, make()))

    def _file(self, name: str) -> pathlib.Path:
        return self.folder.path / "smollm2" / name / "losses.json"

    def _losses(self, name: str) -> dict[str, Any]:
        """Return the mean loss of each row of each text, and for models of this library the bytes of the layers."""
        config, model = self.config, self.problem.model
        if name in peers.TORCH:
            return self._over_texts(peers.by_torch(self.problem.source, name, config.layers))
        if name in peers.QWIX:
            model = peers.by_qwix(model, name, config.group_size)
        else:
            model = quantized(model, self.arms[name], self._calibration, config.lkd)
        losses = self._over_texts(lambda ids: row_losses(model, ids).tolist())
        return losses | {"bytes": sum(x.nbytes for x in jax.tree.leaves(model.groups))}

    def _over_texts(self, losses: Callable[[Any], list[float]]) -> dict[str, Any]:
        return {
            text: [loss for b in batches(rows, self.config.batch_rows) for loss in losses(b)]
            for text, rows in self.problem.tests.items()
        }

    def _calibration(self) -> Calibration:
        config, ids = self.config, self.problem.calibration
        vocabulary = self.problem.vocabulary
        noise = np.random.default_rng(0).integers(0, vocabulary, ids.shape).astype(np.int32)
        return Calibration(
            *([{"input_ids": b} for b in batches(rows, config.batch_rows)] for rows in (ids, noise))
        )

    def _sensitivity(self) -> dict[str, dict[str, float]]:
        """Return the sensitivity for W8A8 and W4/8A8, by layer and by kind of weight, on part of the calibration text."""
        few = self.problem.calibration[: 2 * self.config.batch_rows]
        lessons = [{"input_ids": b} for b in batches(few, self.config.batch_rows)]
        loss = lambda model, batch: row_losses(model, batch["input_ids"]).mean()
        return {
            f"{name}_{by}": sensitivity(self.problem.model, recipe, loss, lessons, by=by)
            for name in ("w8a8", "w4a8")
            if (recipe := self.arms[name].recipe) is not None
            for by in ("layer", "kind")
        }


def batches(
    rows: Int[np.ndarray, "rows length"], size: int
) -> Iterator[Int[np.ndarray, "size length"]]:
    """Yield the rows, ``size`` at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


@jax.jit
def row_losses(model: Transformer, ids: Int[Array, "rows length"]) -> Float[Array, "rows"]:
    """Return the mean loss of each row's tokens after the first, in nats per token."""
    logits = model(ids)[:, :-1].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - chosen, -1)
