"""Checkpoints on disk: ``hpa adapt``, ``ask``, ``calibrate``, ``inspect``, ``compare`` and ``sweep`` (DESIGN 5)."""

from hpa.checkpoint.adapt import Job, JobResult, Listener, adapt_checkpoint, plan_job
from hpa.checkpoint.ask import Answers, AskJob, ask
from hpa.checkpoint.calibrate import CalibrationJob, calibrate_checkpoint
from hpa.checkpoint.files import CheckpointError, Folder
from hpa.checkpoint.statistics import Statistics

__all__ = [
    "Answers",
    "AskJob",
    "CalibrationJob",
    "CheckpointError",
    "Folder",
    "Job",
    "JobResult",
    "Listener",
    "Statistics",
    "adapt_checkpoint",
    "ask",
    "calibrate_checkpoint",
    "plan_job",
]
