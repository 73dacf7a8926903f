"""The exceptions of a run."""

import signal


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names it and says what to do."""


class StoppedBySignal(Exception):
    """A run was stopped by a signal, has saved, and can be resumed; the message says how.

    Attributes:
        signal: The number of the signal.
        status: The exit status of the program: 128 plus the signal's number, as if the signal had ended it.
    """

    def __init__(self, message: str, signal_number: int | None):
        super().__init__(message)
        self.signal = signal_number or signal.SIGTERM
        self.status = 128 + self.signal

    def __reduce__(self):
        return type(self), (str(self), self.signal)


class TrainingDivergedError(RuntimeError):
    """Too many updates in a row were skipped.

    Attributes:
        step: The step at which the run stopped.
        skipped_in_row: The number of consecutive skipped updates.
        last_checkpoint: The step of the newest checkpoint from before the skipped updates, or None. All its numbers are finite,
            but its weights may already be too large.
    """

    def __init__(
        self, step: int, skipped_in_row: int, last_checkpoint: int | None, where: str = ""
    ):
        self.step, self.skipped_in_row, self.last_checkpoint = step, skipped_in_row, last_checkpoint
        saved = (
            "no checkpoint from before them exists"
            if last_checkpoint is None
            else f"the last checkpoint from before them is step {last_checkpoint}{f' in {where}' if where else ''}. To return to "
            f"it, pass step={last_checkpoint} to resume_or_start (or Checkpoints.restore), or move the newer step_* folders away "
            "and resume. If the loss had already left its range at that step, or the run diverges again at once, take an earlier "
            "checkpoint"
        )
        super().__init__(
            f"step {step}: the last {skipped_in_row} updates were skipped, because the loss, the gradient or the update was not "
            f"finite or the batch had no weight; {saved}. Try a lower peak learning rate, a longer warmup, "
            "clip=Clip(1.0) or lower, or float32 instead of bfloat16 in the layer that overflows. Also check the "
            "batches of these steps (labels out of range, rows of only padding)."
        )
