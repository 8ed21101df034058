"""Jobs: train by every rule and seed of a config, keep what comes of it in a folder, and evaluate that."""

from feedbackpath.jobs.run import run_job
from feedbackpath.jobs.signals import Interrupted

__all__ = ["Interrupted", "run_job"]
