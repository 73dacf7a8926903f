"""What can go wrong in a run, as exceptions that a caller can catch by name."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which one and what would do."""


class TrainingDivergedError(RuntimeError):
    """Too many updates in a row were skipped.

    Attributes:
        step: The step at which the run was stopped.
        skipped_in_row: How many updates in a row had been skipped by then.
        last_checkpoint: Step of the newest checkpoint from before the skipped updates, or None.
    """

    def __init__(
        self, step: int, skipped_in_row: int, last_checkpoint: int | None, where: str = ""
    ):
        self.step, self.skipped_in_row, self.last_checkpoint = step, skipped_in_row, last_checkpoint
        saved = (
            "there is no checkpoint from before them"
            if last_checkpoint is None
            else f"the last checkpoint from before them is step {last_checkpoint}{f' in {where}' if where else ''}: to go back to "
            f"it, give step={last_checkpoint} to resume_or_start (or Checkpoints.restore), or move the newer step_* folders away "
            "and resume"
        )
        super().__init__(
            f"step {step}: the last {skipped_in_row} updates were skipped, because the loss, the gradient or the update was not "
            f"finite or the batch had no weight; {saved}. What to try: a lower peak learning rate or a longer warmup, "
            "clip=Clip(1.0) (or lower), float32 instead of bfloat16 in the layer that overflows, and a look at the "
            "batches of these steps (labels out of range, rows that are padding only)."
        )
