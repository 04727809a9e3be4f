"""What a score is: labelled files, synthetic recall, lm-eval tasks, divergence from the teacher on held-out text."""

from dtr_deploy.tasks.base import SPLITS, Split, Task, TaskScore, combined
from dtr_deploy.tasks.build import build_tasks

__all__ = ["SPLITS", "Split", "Task", "TaskScore", "build_tasks", "combined"]
