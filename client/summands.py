"""What a hospital adds to a secure sum: whose rows enter it, and the integers they become.

Every kind is a sum over privacy units. A unit's records give one vector, which the encoding clips
to the charge's norm and rounds; a patient moves the sum of integers by no more than
``Encoding.l2_sensitivity``, or twice that when exchanged for another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from client.hospital import Hospital
from client.rounds import moments_by_unit, scores_by_unit
from client.training import charge_of, features_of, load_student, read_assignment
from common.errors import RefusalError
from common.features import moment_count
from common.learning.gradients import PerRecordGradients
from common.models.sizes import record_numbers
from common.privacy.budget import Charge
from common.privacy.plan import combine_records
from common.randomness import Stream
from common.secagg.encoding import Encoding
from common.tables import Table
from common.tasks import task_of
from common.wire import AggregateTask

Integers = NDArray[np.int64]

# Per-record gradients of at most so many numbers are held at once (float32: 32 MiB).
_CHUNK_NUMBERS = 8 * 2**20


@dataclass(frozen=True)
class Summand:
    """One kind of sum at one hospital.

    ``charge``: what it costs each patient of ``rows``. ``length``: coordinates, known before a row
    is looked at. ``integers(table, encoding, stream)``: the clipped and rounded sum [length] over
    the admitted rows ``table``, before noise; called only once the guard has charged it.
    """

    charge: Charge
    rows: Table
    length: int
    integers: Callable[[Table, Encoding, Stream], Integers]


def summand_of(hospital: Hospital, task: AggregateTask) -> Summand:
    """What ``task`` asks for, by this hospital's own study.

    Raises RefusalError for a stage or round the study does not charge, and MessageError or
    RuntimeError where the models sent are not the study's.
    """
    kinds = {
        "statistics": _moments,
        "finetune": _step,
        "distill": _step,
        "evaluate": _histogram,
    }
    if task.stage not in kinds:
        raise RefusalError(f"refused: no secure sum is made of stage {task.stage!r}")
    return kinds[task.stage](hospital, task, charge_of(hospital.study, task.stage, task.round))


def _moments(hospital: Hospital, task: AggregateTask, charge: Charge) -> Summand:
    """Value, square and presence of every numeric column."""
    del task  # no model enters

    def integers(table: Table, encoding: Encoding, _: Stream) -> Integers:
        return encoding.encode(moments_by_unit(hospital, table).numpy())

    return Summand(charge, hospital.train, moment_count(hospital.study.dictionary), integers)


def _step(hospital: Hospital, task: AggregateTask, charge: Charge) -> Summand:
    """The clipped gradients of one step at the weights that were sent."""
    assignment, plan = read_assignment(hospital.study, task), charge.plan
    weights = assignment.start
    length = weights.numel()

    def integers(table: Table, encoding: Encoding, stream: Stream) -> Integers:
        records = assignment.records(table)
        each = PerRecordGradients(assignment.model, assignment.loss)
        units = plan.sample(stream, records.units)
        total = np.zeros(length, dtype=np.int64)
        seen_each = min(plan.records_per_unit, max(1, records.most)) * records.views
        numbers = length + record_numbers(assignment.model)
        at_once = max(1, _CHUNK_NUMBERS // (numbers * seen_each))
        for chunk in torch.split(units, at_once):
            rows, owners = records.rows_of(chunk, plan.records_per_unit, stream)
            if len(rows):
                gradients = each(weights, records.look(rows, stream), records.targets[rows])
                combined = combine_records(gradients, owners, len(chunk))
                total += encoding.encode(combined.numpy())
        return total

    return Summand(charge, hospital.train, length, integers)


def _histogram(hospital: Hospital, task: AggregateTask, charge: Charge) -> Summand:
    """What the test patients add to the evaluation of the student that was sent."""
    study = hospital.study
    features = features_of(study, task.scaling)
    student = load_student(study, features, task.student)
    shape = task_of(study).release_shape(study.evaluation.bins)

    def integers(table: Table, encoding: Encoding, _: Stream) -> Integers:
        return encoding.encode(scores_by_unit(hospital, student, features, table).numpy())

    return Summand(charge, hospital.test, math.prod(shape), integers)
