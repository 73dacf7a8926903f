"""Training: the state, the step, the loop, checkpoints and run folders."""

from typing import TYPE_CHECKING

from effscale.lazy import lazy_package

if TYPE_CHECKING:
    from effscale.training.batch_ramp import batch_ramp, resize_rows
    from effscale.training.best import Best, KeepBest
    from effscale.training.buckets import Compilation, ShapeBuckets
    from effscale.training.checkpoint import Checkpoints, Restored
    from effscale.training.checkpoint_files import read_checkpoint_config, restore_model
    from effscale.training.clipping import Clip
    from effscale.training.console import ConsoleWriter
    from effscale.training.counter import Counter
    from effscale.training.errors import CheckpointError, StoppedBySignal, TrainingDivergedError
    from effscale.training.evaluation import Evaluation, evaluate, make_eval_step
    from effscale.training.items import HasItems
    from effscale.training.loop import FitResult, fit, resume_or_start
    from effscale.training.loss import Loss
    from effscale.training.metrics import (
        JsonlWriter,
        MetricsWriter,
        MultiWriter,
        TensorBoardWriter,
        read_jsonl,
    )
    from effscale.training.mirror import MirrorError, RunMirror, fetch_run
    from effscale.training.objectives import (
        add_reports,
        head_loss,
        masked_token_loss,
        next_token_loss,
    )
    from effscale.training.optimizers import AdamWConfig
    from effscale.training.pacing import (
        Clock,
        CustomPacing,
        DiscretePacing,
        LinearPacing,
        Pacing,
        RootPacing,
    )
    from effscale.training.partition import (
        NamedLeaf,
        combine,
        decay_mask,
        map_named,
        named_leaves,
        partition,
        trainable_mask,
    )
    from effscale.training.run_folder import RunFolder, check_unused
    from effscale.training.schedules import (
        Schedule,
        ScheduleConfig,
        by_tokens,
        scale_by_learning_rate,
        scale_by_token_schedule,
    )
    from effscale.training.staged import Changes, StagedStep
    from effscale.training.stages import Stages, merge, stages
    from effscale.training.state import (
        CountsSteps,
        TrainState,
        abstract,
        create_train_state,
        ema_model,
    )
    from effscale.training.step import count_tokens, make_train_step, split_batch

__all__ = [
    "AdamWConfig",
    "Best",
    "Changes",
    "CheckpointError",
    "Checkpoints",
    "Clip",
    "Clock",
    "Compilation",
    "ConsoleWriter",
    "Counter",
    "CountsSteps",
    "CustomPacing",
    "DiscretePacing",
    "Evaluation",
    "FitResult",
    "HasItems",
    "JsonlWriter",
    "KeepBest",
    "LinearPacing",
    "Loss",
    "MetricsWriter",
    "MirrorError",
    "MultiWriter",
    "NamedLeaf",
    "Pacing",
    "Restored",
    "RootPacing",
    "RunFolder",
    "RunMirror",
    "Schedule",
    "ScheduleConfig",
    "ShapeBuckets",
    "StagedStep",
    "Stages",
    "StoppedBySignal",
    "TensorBoardWriter",
    "TrainState",
    "TrainingDivergedError",
    "abstract",
    "add_reports",
    "batch_ramp",
    "by_tokens",
    "check_unused",
    "combine",
    "count_tokens",
    "create_train_state",
    "decay_mask",
    "ema_model",
    "evaluate",
    "fetch_run",
    "fit",
    "head_loss",
    "make_eval_step",
    "make_train_step",
    "map_named",
    "masked_token_loss",
    "merge",
    "named_leaves",
    "next_token_loss",
    "partition",
    "read_checkpoint_config",
    "read_jsonl",
    "resize_rows",
    "restore_model",
    "resume_or_start",
    "scale_by_learning_rate",
    "scale_by_token_schedule",
    "split_batch",
    "stages",
    "trainable_mask",
]

lazy_package(__name__)
