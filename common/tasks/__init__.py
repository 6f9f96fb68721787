"""What is learned. A task says what an answer is, how wrong it is, and how good a model is."""

from __future__ import annotations

from common.errors import StudyError, nearest
from common.tasks.classification import Classification
from common.tasks.task import Floats, Measure, Task

__all__ = ["TASKS", "Floats", "Measure", "Task", "task_named"]

TASKS: dict[str, Task] = {
    "diagnosis": Classification(name="diagnosis", image=False),
    "imaging": Classification(name="imaging", image=True),
}


def task_named(name: str) -> Task:
    """The registered task, or a StudyError that names the nearest one."""
    if name not in TASKS:
        raise StudyError(f"task: unknown task {name!r}; {nearest(name, TASKS)}")
    return TASKS[name]
