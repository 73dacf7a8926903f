"""The PyTorch baseline of the experiment ``finetune``: the same recipe, from the same files and batches.

Model, gradient and optimizer do not use effscale: transformers reads the folder, autograd differentiates, and
``torch.optim.AdamW`` updates. Only the batches, the learning rates and the new head's initial weights are shared.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from effscale.atomic import atomic_file
from effscale.experiments.shared.classifier.batches import Batch, TrainingBatches
from effscale.study import Trial
from effscale.training import (
    AdamWConfig,
    ConsoleWriter,
    JsonlWriter,
    MultiWriter,
    TensorBoardWriter,
)
from effscale.training.errors import StoppedBySignal
from effscale.training.signals import StopSignal


def require() -> None:
    """Raise an ImportError that says what to install unless torch and transformers are installed."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"an arm in PyTorch needs torch and transformers ({error}): install them with pip install torch transformers, or choose arms "
            "without it, such as --arms reviews digits fashion"
        ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Twin:
    """The recipe of the PyTorch baseline.

    Attributes:
        folder: The model folder.
        image_size: Size of the images, to which position embeddings are resized; None for a text model.
        kernel: The head's initial weights, of shape ``(width, classes)``.
        bias: The head's initial bias.
        optimizer: Options of AdamW.
        clip_norm: Maximum norm of the gradient.
        rates: Learning rate of each step.
        dropout: Whether to use the config's dropout rates.
        seed: Seed of dropout.
    """

    folder: pathlib.Path
    image_size: int | None
    kernel: np.ndarray
    bias: np.ndarray
    optimizer: AdamWConfig
    clip_norm: float
    rates: list[float]
    dropout: bool
    seed: int

    def build(self) -> Any:
        """Return a ``torch.nn.ModuleDict`` of the ``trunk`` and the linear layer ``classes``."""
        import torch
        import transformers

        transformers.logging.set_verbosity_error()  # the pooler is left out on purpose
        transformers.logging.disable_progress_bar()
        if self.image_size is None:
            trunk = _text_trunk(self.folder)
        else:
            trunk = _image_trunk(self.folder, self.image_size)
        classes = torch.nn.Linear(*self.kernel.shape)
        with torch.no_grad():
            classes.weight.copy_(torch.tensor(self.kernel.T))
            classes.bias.copy_(torch.tensor(self.bias))
        return torch.nn.ModuleDict({"trunk": trunk, "classes": classes})


def train(
    twin: Twin,
    batches: TrainingBatches,
    evaluation: Callable[[], Iterable[Batch]],
    trial: Trial,
) -> None:
    """Train, and write the same records as ``effscale.training.fit``, or resume from the checkpoint of each epoch.

    Args:
        twin: The recipe.
        batches: Training batches, one for each learning rate.
        evaluation: Returns the test batches, from the start at each call.
        trial: Where to write.

    Raises:
        StoppedBySignal: After SIGTERM or Ctrl-C, once everything is saved.
    """
    import torch

    name = trial.place.relative_to(trial.study)
    print(name, file=sys.stderr)
    checkpoint = trial.place / "checkpoints" / "last.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(twin.seed)
    model = twin.build().train(twin.dropout)
    optimizer = make_optimizer(model, twin.optimizer)
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        batches.set_state({"step": saved["step"]})

    def save() -> None:
        writer.flush()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        with atomic_file(checkpoint) as temporary:
            torch.save(state | {"step": batches.step, "random": torch.get_rng_state()}, temporary)

    start = batches.step
    writer = MultiWriter(
        [
            JsonlWriter(trial.place / "metrics.jsonl", resume_step=start),
            TensorBoardWriter(trial.study / "tensorboard" / name, resume_step=start),
            ConsoleWriter(len(twin.rates), start_step=start),
        ]
    )
    try:
        with StopSignal() as stop:
            while (step := batches.step) < len(twin.rates):
                for group in optimizer.param_groups:
                    group["lr"] = twin.rates[step]
                batch = next(batches)
                loss = losses(logits(model, batch), batch).mean()
                optimizer.zero_grad()
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), twin.clip_norm)
                optimizer.step()
                values = {"loss": loss.item(), "grad_norm": norm.item()}
                writer.write(step + 1, values | {"learning_rate": twin.rates[step]})
                if batches.step % batches.per_epoch == 0 or batches.step == len(twin.rates):
                    writer.write(step + 1, evaluate(model, evaluation()))
                    save()
                if stop.should_stop(step):
                    save()
                    raise StoppedBySignal(
                        f"stopped and saved {trial.place} at step {batches.step}", stop.received
                    )
    finally:
        writer.close()


def logits(model: Any, batch: Batch) -> Any:
    """Return class scores, from the mean over a text's tokens or from an image's class token."""
    import torch

    if "images" in batch:
        pixels = torch.from_numpy(batch["images"]).permute(0, 3, 1, 2)
        row = model["trunk"](pixels).last_hidden_state[:, 0]
    else:
        mask = torch.from_numpy(batch["attention_mask"])
        ids = torch.from_numpy(batch["input_ids"])
        hidden = model["trunk"](ids, attention_mask=mask).last_hidden_state
        row = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    rate = model["trunk"].config.hidden_dropout_prob
    return model["classes"](torch.nn.functional.dropout(row, rate, model.training))


def losses(logits: Any, batch: Batch) -> Any:
    """Return the cross entropy of each row."""
    import torch

    labels = torch.from_numpy(batch["labels"]).long()
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def evaluate(model: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Return mean loss and accuracy over batches, with rows weighted."""
    import torch

    total = right = count = 0.0
    training = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            scores, weights = logits(model, batch), batch["weights"]
            total += float((losses(scores, batch).numpy() * weights).sum())
            right += float(((scores.argmax(1).numpy() == batch["labels"]) * weights).sum())
            count += float(weights.sum())
    model.train(training)
    return {"test_loss": total / count, "test_accuracy": right / count}


def make_optimizer(model: Any, config: AdamWConfig) -> Any:
    """Create AdamW with weight decay only on matrices, as in ``effscale.training.decay_mask``."""
    import torch

    # The class token of a ViT has three dimensions, two of size 1, so it is a vector.
    matrix = lambda p: sum(size > 1 for size in p.shape) >= 2
    decayed = [p for p in model.parameters() if matrix(p)]
    others = [p for p in model.parameters() if not matrix(p)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.b1, config.b2), eps=config.eps)


def _text_trunk(folder: pathlib.Path) -> Any:
    from transformers import BertModel

    return BertModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)


def _image_trunk(folder: pathlib.Path, image_size: int) -> Any:
    """Return the ViT with position embeddings resized once, so that those of the small grid are trained."""
    import torch
    from einops import rearrange
    from transformers import ViTModel

    whole: Any = ViTModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
    state, name = whole.state_dict(), "embeddings.position_embeddings"
    first, grid = state[name][:, :1], state[name][:, 1:]
    side = image_size // whole.config.patch_size
    grid = rearrange(grid, "1 (h w) d -> 1 d h w", h=round(grid.shape[1] ** 0.5))
    grid = torch.nn.functional.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    state[name] = torch.cat([first, rearrange(grid, "1 d h w -> 1 (h w) d")], 1)
    whole.config.image_size = image_size
    trunk = ViTModel(whole.config, add_pooling_layer=False)
    trunk.load_state_dict(state)
    return trunk
