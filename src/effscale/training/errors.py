"""What can go wrong in a run, as exceptions that a caller can catch by name."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which one and what would do."""


class TrainingDivergedError(RuntimeError):
    """Too many updates in a row were skipped.

    Attributes:
        step: The step at which the run was stopped.
        skipped_in_row: How many updates in a row had been skipped by then.
        last_checkpoint: Step of the newest checkpoint, or None.
    """

    def __init__(
        self, step: int, skipped_in_row: int, last_checkpoint: int | None, where: str = ""
    ):
        self.step, self.skipped_in_row, self.last_checkpoint = step, skipped_in_row, last_checkpoint
        saved = (
            "no checkpoint was written"
            if last_checkpoint is None
            else f"the last good checkpoint is step {last_checkpoint}{f' in {where}' if where else ''}"
        )
        super().__init__(
            f"step {step}: the last {skipped_in_row} updates were skipped, because loss or gradient was not finite "
            f"or the batch had no weight; {saved}. What to try: a lower peak learning rate or a longer warmup, "
            "clip_norm=1.0 (or lower), float32 instead of bfloat16 in the layer that overflows, and a look at the "
            "batches of these steps (labels out of range, rows that are padding only)."
        )
