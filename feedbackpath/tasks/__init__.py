"""Tasks: what a network learns from, what it loses, and what it is judged by."""

from feedbackpath.tasks import text
from feedbackpath.tasks.task import Task, TensorSplit, load_task, register_task

__all__ = ["Task", "TensorSplit", "load_task", "register_task", "text"]
