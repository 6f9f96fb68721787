"""A curious coordinator: what the updates of this very run tell about who was trained on.

It follows the protocol, and guesses. At each hospital it knows every record; of some patients, the
candidates, it does not know whether they are among the training patients or among those kept for
testing. An update is, nearly, a sum of the training patients' clipped gradients under noise of a
known size; gradients at the weights it sent it can compute itself. The best linear guess of who is
in the sum (least mean square error, prior one half) gives each candidate a score.

To tell what the noise is worth, each hospital answers the same questions a second time, with the
same clipping and sampling and without noise; only this file ever sees those answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Message
from numpy.typing import NDArray
from torch import Tensor

from client.guard import MemoryGuard
from client.hospital import Hospital
from client.rounds import training_release, training_request, training_round
from client.training import Assignment, read_assignment
from common.features import Scaling, scaling_tensor
from common.flower import read, unpack
from common.learning.gradients import PerRecordGradients
from common.learning.metrics import auc_of_scores
from common.learning.optimisers import learning_rate_at
from common.privacy.budget import stage_charge
from common.privacy.plan import StepPlan, combine_records
from common.study import Study
from common.tables import Table
from common.tensors import load_tensors, save_tensors
from common.wire import TrainReply, TrainTask
from server.store import RunFolder
from simulations.bootstrap import interval
from simulations.draws import first
from simulations.poison import scenario_of

Floats = NDArray[np.float64]

_WHISPER = 1e-9  # a plan without any noise does not exist
_EXACT = 1e-3  # what stands for the noise, in clip norms, where there is none


@dataclass(frozen=True)
class Observer:
    """Keeps what passes by: ``folder/ROUND-HOSPITAL.safetensors`` for each update."""

    folder: Path

    def see(self, hospital: Hospital, message: Message, reply: Message) -> None:
        """Keep one round's weights and update, and what the update is without noise."""
        task, seen = unpack(TrainTask, message.content), read(TrainReply, reply)
        if task.stage != "finetune":
            return
        assignment = training_round(hospital.study, task)
        save_tensors(
            self.folder / f"{task.round + 1:04d}-{hospital.name}.safetensors",
            {
                "weights": assignment.start,
                "with_noise": seen.update,
                "without_noise": _without_noise(hospital, assignment, task),
            },
        )


def _without_noise(hospital: Hospital, assignment: Assignment, task: TrainTask) -> Tensor:
    """The hospital's update [d] under the same choices, from the same stream, and next to no noise.

    For the observer's comparison alone: it passes no gate.
    """
    records = assignment.records(hospital.train)
    asked = training_release(
        hospital, assignment, hospital.train, records.units, training_request(task)
    )
    stream = MemoryGuard(hospital.guard.noise).charge(asked)
    charge = assignment.charge
    if charge.plan.private:
        plan = replace(charge.plan, noise_multiplier=_WHISPER)
        assignment = replace(assignment, charge=replace(charge, plan=plan))
    return assignment.update(records, hospital.declared_patients, stream)


@dataclass(frozen=True)
class _View:
    """One hospital's gradients and updates in one round, in sums of clipped gradients.

    ``gradients`` [candidates, d]; ``sums``: the update as such a sum [d], less the members known.
    """

    gradients: Floats
    sums: dict[str, Floats]


def observed(run: RunFolder, study: Study, hospitals: list[Hospital]) -> dict[str, Any] | None:
    """How well members are told from others, with and without noise; None without an observer.

    ``with_noise``, ``without_noise``: area under the ROC curve with its 95 % interval over patients
    (0.5 is guessing). ``ceiling``: no attack on one whole run can be expected to exceed it.
    """
    spec = scenario_of(study).observer
    if spec is None:
        return None
    plan = stage_charge(study, "finetune").plan
    noise_std = plan.noise_std / math.sqrt(study.finetune.local_steps)
    scores: dict[str, list[Floats]] = {"with_noise": [], "without_noise": []}
    members: list[NDArray[np.int64]] = []
    for hospital in hospitals:
        inside, outside = (
            _some(study, hospital.name, table, spec.candidates)
            for table in (hospital.train, hospital.test)
        )
        views = list(_views(run, study, hospital, inside, outside, plan))
        if not views:
            continue  # it never answered
        members.append(np.repeat([1, 0], [len(inside), len(outside)]))
        for sight, std in (("with_noise", noise_std), ("without_noise", 0.0)):
            scores[sight].append(_guess(views, sight, max(std, _EXACT * plan.clip_norm)))
    if not members:
        return None
    labels = np.concatenate(members)
    found = {
        sight: list(interval(_area, labels, np.concatenate(each), seed=study.seed))
        for sight, each in scores.items()
    }
    return {
        "members": int(labels.sum()),
        "others": int((1 - labels).sum()),
        **found,
        "ceiling": ceiling(study.privacy.epsilon, study.privacy.delta),
    }


def ceiling(epsilon: float | None, delta: float | None) -> float | None:
    """The largest area under the ROC curve of any test that (ε, δ)-DP allows.

    Such a test errs at least f(α) = max(0, 1−δ−e^ε α, e^−ε (1−δ−α)) (Kairouz, Oh & Viswanath
    2015, theorem 2.1); the area is one minus the integral of f.

    >>> round(ceiling(1.0, 1e-5), 3)
    0.731
    """
    if epsilon is None or delta is None:
        return None
    return 1 - (1 - delta) ** 2 / (1 + math.exp(epsilon))


def _views(
    run: RunFolder,
    study: Study,
    hospital: Hospital,
    inside: list[str],
    outside: list[str],
    plan: StepPlan,
) -> Iterator[_View]:
    paths = sorted(
        (run.path / "observer").glob(f"[0-9][0-9][0-9][0-9]-{hospital.name}.safetensors")
    )
    if not paths:
        return
    assignment = _assignment(run, study)
    expected = hospital.declared_patients * plan.sampling_rate
    for path in paths:
        found, number = load_tensors(path), int(path.name[:4]) - 1
        trained, tested = (
            _gradients(assignment, found["weights"], table, plan)
            for table in (hospital.train, hospital.test)
        )
        # Members that are no candidates are known: their part is taken away.
        known = sum(
            (one for name, one in trained.items() if name not in set(inside)),
            torch.zeros_like(found["weights"]),
        )
        moved = _moved(study, number)
        sums = {
            sight: (-found[sight] * (expected / moved) - known * plan.sampling_rate)
            .double()
            .numpy()
            for sight in ("with_noise", "without_noise")
        }
        each = [trained[name] for name in inside] + [tested[name] for name in outside]
        yield _View(torch.stack(each).double().numpy(), sums)


def _guess(views: list[_View], sight: str, noise_std: float) -> Floats:
    """Each candidate's part in the sums [candidates]: linear least squares, x ~ (1/2, 1/4)."""
    count = len(views[0].gradients)
    left = np.eye(count) * 4.0
    right = np.full(count, 2.0)
    for view in views:
        weighed = view.gradients / noise_std**2
        left += weighed @ view.gradients.T
        right += weighed @ view.sums[sight]
    return np.linalg.solve(left, right)


def _moved(study: Study, round_number: int) -> float:
    """By how much a unit gradient moves the weights in a round: its steps' learning rates."""
    spec = study.finetune
    steps = range(round_number * spec.local_steps, (round_number + 1) * spec.local_steps)
    return sum(learning_rate_at(spec.optimiser, step, spec.releases) for step in steps)


def _gradients(
    assignment: Assignment, weights: Tensor, table: Table, plan: StepPlan
) -> dict[str, Tensor]:
    """Each patient's clipped gradient at ``weights``."""
    records = assignment.records(table)
    each = PerRecordGradients(assignment.model, assignment.loss)
    gradients = each(weights, records.inputs, records.targets)
    combined = combine_records(gradients, records.owners, records.units)
    if plan.private:
        combined = combined * plan.clip_factors(combined.norm(dim=1))[:, None]
    return dict(zip(dict.fromkeys(table.patients), combined, strict=True))


def _assignment(run: RunFolder, study: Study) -> Assignment:
    """What hospitals were asked; where an encoder stayed frozen, the final one is the same."""
    scaling = Scaling.from_dict(run.read_json("result.json")["scaling"])
    task = TrainTask(
        study_digest=study.digest(),
        stage="finetune",
        round=0,
        attempt=0,
        teacher=load_tensors(run.path / "teacher.safetensors"),
        student={},
        scaling=scaling_tensor(study.dictionary, scaling),
    )
    return read_assignment(study, task)


def _some(study: Study, hospital: str, table: Table, at_most: int) -> list[str]:
    names = dict.fromkeys(table.patients)
    return first(study.seed, names, at_most, "candidates", hospital)


def _area(labels: NDArray[np.int64], scores: Floats) -> float:
    return auc_of_scores(labels > 0, scores)
