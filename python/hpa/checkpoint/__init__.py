"""Checkpoints on disk: what ``hpa adapt``, ``calibrate``, ``inspect``, ``compare`` and ``sweep`` do (DESIGN 5)."""

from hpa.checkpoint.adapt import Job, JobResult, Listener, adapt_checkpoint, plan_job
from hpa.checkpoint.calibrate import CalibrationJob, calibrate_checkpoint
from hpa.checkpoint.files import CheckpointError, Folder
from hpa.checkpoint.statistics import Statistics

__all__ = [
    "CalibrationJob",
    "CheckpointError",
    "Folder",
    "Job",
    "JobResult",
    "Listener",
    "Statistics",
    "adapt_checkpoint",
    "calibrate_checkpoint",
    "plan_job",
]
