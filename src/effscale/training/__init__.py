"""Training: the state, the step, the loop, checkpoints and run folders."""

from typing import TYPE_CHECKING

from effscale.lazy import lazy_package

if TYPE_CHECKING:
    from effscale.training.batch_ramp import batch_ramp, resize_rows
    from effscale.training.best import KeepBest
    from effscale.training.buckets import ShapeBuckets
    from effscale.training.checkpoint import Checkpoints
    from effscale.training.checkpoint_files import read_checkpoint_config, restore_model
    from effscale.training.clipping import Clip
    from effscale.training.console import ConsoleWriter
    from effscale.training.errors import CheckpointError, TrainingDivergedError
    from effscale.training.evaluation import Evaluation, evaluate, make_eval_step
    from effscale.training.loop import fit, resume_or_start
    from effscale.training.loss import Loss
    from effscale.training.metrics import JsonlWriter, MultiWriter, TensorBoardWriter, read_jsonl
    from effscale.training.mirror import MirrorError, RunMirror, fetch_run
    from effscale.training.objectives import add_reports, masked_token_loss, next_token_loss
    from effscale.training.pacing import CustomPacing, DiscretePacing, LinearPacing, RootPacing
    from effscale.training.partition import decay_mask, named_leaves
    from effscale.training.run_folder import RunFolder
    from effscale.training.schedules import AdamWConfig, ScheduleConfig, by_tokens
    from effscale.training.staged import StagedStep
    from effscale.training.stages import Stages, merge, stages
    from effscale.training.state import TrainState, abstract, create_train_state
    from effscale.training.step import make_train_step

__all__ = [
    "AdamWConfig",
    "CheckpointError",
    "Checkpoints",
    "Clip",
    "ConsoleWriter",
    "CustomPacing",
    "DiscretePacing",
    "Evaluation",
    "JsonlWriter",
    "KeepBest",
    "LinearPacing",
    "Loss",
    "MirrorError",
    "MultiWriter",
    "RootPacing",
    "RunFolder",
    "RunMirror",
    "ScheduleConfig",
    "ShapeBuckets",
    "StagedStep",
    "Stages",
    "TensorBoardWriter",
    "TrainState",
    "TrainingDivergedError",
    "abstract",
    "add_reports",
    "batch_ramp",
    "by_tokens",
    "create_train_state",
    "decay_mask",
    "evaluate",
    "fetch_run",
    "fit",
    "make_eval_step",
    "make_train_step",
    "masked_token_loss",
    "merge",
    "named_leaves",
    "next_token_loss",
    "read_checkpoint_config",
    "read_jsonl",
    "resize_rows",
    "restore_model",
    "resume_or_start",
    "stages",
]

lazy_package(__name__)
