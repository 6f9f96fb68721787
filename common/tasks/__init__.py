"""What is learned. A task says what an answer is, how wrong it is, and how good a model is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common import plugins
from common.dictionary import Dictionary
from common.errors import nearest
from common.tasks.classification import classification
from common.tasks.language import language
from common.tasks.prognosis import prognosis, prognosis_by_mass
from common.tasks.regression import regression
from common.tasks.several import several
from common.tasks.task import Floats, Measure, Task, Unreleased, shared_numbers
from common.tasks.treatment import treatment, treatment_effect, treatment_targeted

if TYPE_CHECKING:
    from common.study import Study

__all__ = [
    "TASKS",
    "Entry",
    "Floats",
    "Measure",
    "Task",
    "Unreleased",
    "shared_numbers",
    "task_named",
    "task_of",
]


@dataclass(frozen=True)
class Entry:
    """A task by its name: ``make(name, dictionary)``, for records of one of ``modalities`` with an
    outcome of one of the kinds ``outcomes``."""

    make: Callable[[str, Dictionary], Task]
    modalities: tuple[str, ...]
    outcomes: tuple[str, ...]

    def fits(self, dictionary: Dictionary) -> bool:
        """Whether the dictionary has such records and such an outcome."""
        return dictionary.modality in self.modalities and dictionary.label.kind in self.outcomes


TASKS: dict[str, Entry] = {
    "diagnosis": Entry(classification, ("table",), ("classes",)),
    "imaging": Entry(classification, ("image",), ("classes",)),
    "notes": Entry(classification, ("text",), ("classes",)),
    "language": Entry(language, ("text",), ("text",)),
    "screening": Entry(classification, ("molecule",), ("classes",)),
    "regression": Entry(regression, ("table", "image", "text", "molecule"), ("number",)),
    "several": Entry(several, ("table", "image", "text", "molecule"), ("several",)),
    "prognosis": Entry(prognosis, ("table", "image"), ("survival",)),
    "prognosis-mass": Entry(prognosis_by_mass, ("table", "image"), ("survival",)),
    "treatment": Entry(treatment, ("table", "image"), ("effect",)),
    "treatment-effect": Entry(treatment_effect, ("table", "image"), ("effect",)),
    "treatment-targeted": Entry(treatment_targeted, ("table", "image"), ("effect",)),
}


def task_named(name: str, dictionary: Dictionary) -> Task:
    """The registered task, asked of ``dictionary``.

    Raises ValueError, in one line, for an unknown name (naming the nearest) or another dictionary
    (naming the tasks that fit it).
    """
    entry = _entry(name)
    for what, wanted, found in (
        ("records of kind", entry.modalities, dictionary.modality),
        ("dictionary.label.kind", entry.outcomes, dictionary.label.kind),
    ):
        if found not in wanted:
            fitting = [f"task = {one!r}" for one, entry in TASKS.items() if entry.fits(dictionary)]
            advice = f"did you mean {' or '.join(fitting)}?" if fitting else "no task has that"
            raise ValueError(
                f"task = {name!r}: expected {what} {' or '.join(wanted)}, found {found}; {advice}"
            )
    return entry.make(name, dictionary)


def _entry(name: str) -> Entry:
    if name in TASKS:
        return TASKS[name]
    others = plugins.installed(plugins.TASKS_GROUP)
    if ":" not in name and name not in others:
        raise ValueError(f"task: unknown task {name!r}; {nearest(name, [*TASKS, *others])}")
    try:
        entry: Entry = plugins.found(plugins.TASKS_GROUP, name, Entry)
    except ValueError as error:
        raise ValueError(f"task = {error}") from None
    return entry


def task_of(study: Study) -> Task:
    """What ``study`` asks."""
    return task_named(study.task, study.dictionary)
