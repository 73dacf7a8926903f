"""Compile a training step of a large model for a machine you do not have: its memory and traffic, and an estimate of its speed."""

from effscale.plan.config import PRESETS, Config
from effscale.plan.experiment import main, run

__all__ = ["PRESETS", "Config", "main", "run"]
