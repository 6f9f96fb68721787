"""What a study costs, before anything runs: sizes, operations, bytes, time and ε.

Nothing here is a formula of its own. Operations are counted while the models run, and one round of
each stage is tried on made-up patients by the very code of coordinator and hospitals: its messages
are measured, and the processor time of one hospital.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from flwr.app import Message
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.features import FeatureMap, range_scaling
from common.learning.distill import distill_publicly
from common.learning.pretrain import pretrain
from common.models import build_student, build_teacher, learner
from common.models.pretrained import PinnedEncoder
from common.privacy.budget import budget_of, evaluation_budget_of
from common.privacy.units import Trust
from common.scenario import NetworkSpec
from common.study import Study
from common.tables import Table
from server.conduct import public_inputs
from server.store import RunFolder
from simulations.grid import one_by_one
from simulations.hospitals import Site, World, open_world, seeded_noise
from simulations.made_up import made_up_table
from simulations.scenarios import occasion_of
from simulations.simulate import answering, conduct_over, load_hospitals

PATIENTS = 1000
_ORDER = ("statistics", "pretrain", "finetune", "distill", "evaluate")
_PUBLIC_RECORDS = 512
_FEW_STEPS, _MORE_STEPS = 2, 12
_ROWS, _DIFFERENT_ROWS, _MOST_ROWS, _BATCH_S, _REPEATS = 16, 64, 4096, 0.05, 5
_INSTANT = 1e12  # records a second: the tried round's virtual time is that of the line alone


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """One model. ``trained``: numbers that patients change, and that each round carries.

    ``flops``: of one record's answer, multiplications and additions counted singly.
    ``activation_bytes``: what one record keeps in memory until its gradient is known.
    ``answer_us``: processor time of one record's answer in a batch, in microseconds.
    """

    parameters: int
    trained: int
    weight_bytes: int
    flops: int
    activation_bytes: int
    answer_us: float


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """One stage; the figures are those of one hospital in a round, or of the coordinator in a step.

    ``flops``: counted singly; 0 where none are counted. ``line_s``: what the slowest hospital's
    messages take on the study's line. ``epsilon``: spent after this stage and all before it, or for
    the evaluation by its own patients; None where it costs patients nothing.
    """

    stage: str
    at: str
    rounds: int
    bytes_down: float
    bytes_up: float
    flops: int
    cpu_s: float
    line_s: float
    epsilon: float | None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A whole study, for hospitals of so many training ``patients`` each."""

    hospitals: int
    patients: int
    line: NetworkSpec
    teacher: ModelCost
    student: ModelCost
    stages: tuple[StageCost, ...]

    @property
    def duration_s(self) -> float:
        """From the first message to the last, hospitals side by side."""
        return sum(one.rounds * (one.cpu_s + one.line_s) for one in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """Plain data. ``all_cpu_s`` of a stage: of all its rounds, at all hospitals."""
        stages = [
            asdict(one)
            | {
                "all_cpu_s": one.cpu_s
                * one.rounds
                * (self.hospitals if one.at == "hospital" else 1),
                "measured": None,
            }
            for one in self.stages
        ]
        return {
            "hospitals": self.hospitals,
            "patients": self.patients,
            "line": self.line.model_dump(mode="json"),
            **ratios(self.teacher, self.student),
            "stages": stages,
            "duration_s": self.duration_s,
        }


def ratios(teacher: ModelCost, student: ModelCost) -> dict[str, Any]:
    """Both, and how many times fewer parameters and operations and how much less processor time
    the student takes."""
    return {
        "teacher": asdict(teacher),
        "student": asdict(student),
        "smaller": teacher.parameters / student.parameters,
        "fewer_flops": teacher.flops / student.flops,
        "faster": teacher.answer_us / student.answer_us,
    }


def cost_of(study: Study, *, patients: int = PATIENTS, hospitals: int | None = None) -> Cost:
    """Try ``study`` on made-up patients, ``patients`` in training at each hospital.

    ``hospitals``: how many the study will have; else as many as it says.
    """
    teacher, student = model_costs(study)
    tried_with = _hospital_count(study)
    tried = _try_round(study, patients, tried_with)
    return Cost(
        hospitals=hospitals or _hospitals_of(study),
        patients=patients,
        line=_line(study),
        teacher=teacher,
        student=student,
        stages=tuple(_stages(study, tried, tried_with)),
    )


def model_costs(study: Study) -> tuple[ModelCost, ModelCost]:
    """Teacher and student of ``study``."""
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    teacher, student = build_teacher(study, features), build_student(study, features)
    # Few different records, over and over: to encode many costs more than to answer them.
    few = features.encode(made_up_table(study, _DIFFERENT_ROWS))
    inputs = few.repeat(_MOST_ROWS // _DIFFERENT_ROWS, *[1] * (few.dim() - 1))
    learned = learner(study, teacher)
    in_patients = student if study.distill.on == "patients" else None
    return _model_cost(teacher, learned, inputs), _model_cost(student, in_patients, inputs)


def run_cost(run: RunFolder, study: Study, patients: int | None = None) -> dict[str, Any]:
    """A finished simulated run's cost as foreseen, each stage with what was measured.

    ``patients``: else as many as its hospitals declared on average. Raises RunError for a run that
    is not finished or not simulated.
    """
    measured = {one["stage"]: one for one in measured_stages(run)}
    declared = [one.declared_patients for one in load_hospitals(run.path)[1]]
    mean = round(sum(declared) / len(declared))
    foreseen = cost_of(study, patients=patients or mean, hospitals=len(declared))
    facts = foreseen.as_dict()
    for one in facts["stages"]:
        one["measured"] = measured.get(one["stage"])
    return facts


def measured_stages(run: RunFolder) -> list[dict[str, Any]]:
    """What each stage of a finished run took.

    ``bytes_down``, ``bytes_up``: of one hospital in a round; None where no hospital is asked.
    ``cpu_s``, ``elapsed_s``: of all rounds and hospitals in this process; None where not kept. A
    round that was done again after an interruption counts once.
    """
    seconds = {(line["stage"], line["round"]): line for line in run.costs()}
    asked = run.read_json("result.json").get("forecast") or {"rounds": []}
    rounds: dict[str, list[dict[str, Any]]] = {}
    for one in asked["rounds"]:
        rounds.setdefault(one["stage"], []).append(one)
    names = {*rounds, *(stage for stage, _ in seconds)}
    return [
        _measured(
            stage, rounds.get(stage, []), [x for key, x in seconds.items() if key[0] == stage]
        )
        for stage in _ORDER
        if stage in names
    ]


def _measured(
    stage: str, rounds: list[dict[str, Any]], seconds: list[dict[str, Any]]
) -> dict[str, Any]:
    answers = sum(one["answered"] for one in rounds)
    return {
        "stage": stage,
        "rounds": len(rounds) or len(seconds),
        **{
            key: sum(one[key] for one in rounds) / answers if answers else None
            for key in ("bytes_down", "bytes_up")
        },
        **{
            key: sum(one[key] for one in seconds) if seconds else None
            for key in ("cpu_s", "elapsed_s")
        },
    }


def _model_cost(model: nn.Module, learned: nn.Module | None, inputs: Tensor) -> ModelCost:
    model.eval()
    parts = [] if learned is None else [p for p in learned.parameters() if p.requires_grad]
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(inputs[:1])
        model(inputs[:_ROWS])  # the first call is slower than all others
        each_s = _cpu_s(lambda: model(inputs[:_ROWS])) / _ROWS
        rows = inputs[: max(_ROWS, min(_MOST_ROWS, int(_BATCH_S / max(each_s, 1e-9))))]
        seconds = [_cpu_s(lambda: model(rows)) for _ in range(_REPEATS)]
    weights = _weights(model)
    return ModelCost(
        parameters=sum(one.numel() for one in weights),
        trained=sum(one.numel() for one in parts),
        weight_bytes=sum(one.numel() * one.element_size() for one in weights),
        flops=counter.get_total_flops(),
        activation_bytes=_kept_bytes(model, inputs[:1]),
        answer_us=median(seconds) / len(rows) * 1e6,
    )


def _weights(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter that answers, those of a pinned model as well, each once."""
    pinned = [one.pinned for one in model.modules() if isinstance(one, PinnedEncoder)]
    each = {id(one): one for part in (model, *pinned) for one in part.parameters()}
    return list(each.values())


def _kept_bytes(model: nn.Module, record: Tensor) -> int:
    """Bytes that autograd keeps for one record, weights and the record itself left out."""
    known = {one.data_ptr() for one in (*model.parameters(), record)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known and tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(record)
    return sum(kept.values())


def _cpu_s(work: Callable[[], Any]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


@dataclass(frozen=True)
class _Tried:
    """One round of each stage: ``rounds`` as a forecast has them, and one hospital's work."""

    rounds: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    flops: dict[str, int]


@dataclass
class _Watched:
    """A backend's handler whose work is kept by stage: the first hospital's operations, and the
    processor time of each of the others."""

    handle: Callable[[Message], Message]
    seconds: dict[str, dict[int, float]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(float))
    )
    flops: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def __call__(self, message: Message) -> Message:
        stage, node = occasion_of(message).stage, message.metadata.dst_node_id
        if node == 1:
            with FlopCounterMode(display=False) as counter:
                reply = self.handle(message)
            self.flops[stage] += counter.get_total_flops()
            return reply
        before = time.process_time()
        reply = self.handle(message)
        self.seconds[stage][node] += time.process_time() - before
        return reply


def _try_round(study: Study, patients: int, hospitals: int) -> _Tried:
    tried = one_round_of(study, hospitals)
    assert tried.simulation is not None  # noqa: S101  (just given)
    folds = study.evaluation.folds
    table = made_up_table(tried, -(-patients * folds // (folds - 1)))
    sites = tuple(Site(name, table) for name in tried.simulation.names)
    world = World(tried, sites, _corpus(tried))
    members = open_world(world, seeded_noise(0, [site.name for site in world.sites]))
    watched = _Watched(answering(members, debug=True))
    with tempfile.TemporaryDirectory(prefix="consilium-cost-") as folder:
        run = RunFolder.create(Path(folder) / "run", tried)
        backend = one_by_one(watched, debug=True)
        conduct_over(tried, run, members, backend, world.corpus, lambda _: None)
        rounds = run.read_json("result.json")["forecast"]["rounds"]
    return _Tried(
        {one["stage"]: one for one in rounds},
        {stage: median(each.values()) for stage, each in watched.seconds.items()},
        watched.flops,
    )


def _corpus(study: Study) -> Table | None:
    return None if study.public.kind == "dictionary" else made_up_table(study, _PUBLIC_RECORDS)


def one_round_of(study: Study, hospitals: int) -> Study:
    """The study with one round or step of everything, over so many hospitals on its line.

    Under the noise of the whole study: one round alone would get less, for which a secure sum may
    have no room.
    """
    budget = budget_of(study)
    line = _line(study).model_copy(update={"records_per_s": _INSTANT})
    return study.revised(
        pretrain__steps=min(1, study.pretrain.steps),
        finetune__rounds=1,
        distill__steps=1,
        distill__rounds=1,
        privacy__epsilon=budget.spent("finetune", 1) if study.privacy.epsilon else None,
        simulation={
            "hospitals": hospitals,
            "source": {"kind": "csv", "path": "made up"},
            "scenario": {"network": line.model_dump(mode="json")},
        },
    )


def _hospitals_of(study: Study) -> int:
    return len(study.simulation.names) if study.simulation else _hospital_count(study)


def _hospital_count(study: Study) -> int:
    """As many as enrolled for secure sums, whose messages depend on it; else as few as do."""
    if study.privacy.trust is Trust.DISTRIBUTED:
        assert study.federation.hospitals is not None  # noqa: S101  (the study refuses it)
        return study.federation.hospitals
    return max(2, study.federation.minimum_hospitals)


def _line(study: Study) -> NetworkSpec:
    scenario = study.simulation.scenario if study.simulation else None
    return scenario.network if scenario else NetworkSpec()


def _stages(study: Study, tried: _Tried, hospitals: int) -> Iterator[StageCost]:
    budget, testing = budget_of(study), evaluation_budget_of(study)
    rounds = {one.stage: one.rounds for one in budget.charges}
    steps_s = dict(_coordinator_steps(study))
    for stage in _ORDER:
        if stage in steps_s:
            steps = study.pretrain.steps if stage == "pretrain" else study.distill.steps
            yield StageCost(
                stage=stage,
                at="coordinator",
                rounds=steps,
                bytes_down=0,
                bytes_up=0,
                flops=0,
                cpu_s=steps_s[stage],
                line_s=0,
                epsilon=None,
            )
        elif stage in tried.rounds:
            seen = tried.rounds[stage]
            spent = budget.spent(stage, rounds[stage]) if stage in rounds else None
            yield StageCost(
                stage=stage,
                at="hospital",
                rounds=rounds.get(stage, 1),
                bytes_down=seen["bytes_down"] / hospitals,
                bytes_up=seen["bytes_up"] / hospitals,
                flops=tried.flops[stage],
                cpu_s=tried.seconds[stage],
                line_s=seen["duration_s"],
                epsilon=testing.total() if testing and stage == "evaluate" else spent,
            )


def _coordinator_steps(study: Study) -> Iterator[tuple[str, float]]:
    """Seconds of a step of each stage on public records."""
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    teacher, student = build_teacher(study, features), build_student(study, features)
    corpus = _corpus(study)
    public = public_inputs(study, features, corpus)
    if study.pretrain.steps:
        yield (
            "pretrain",
            _step_s(
                lambda steps: pretrain(
                    study.revised(pretrain__steps=steps), teacher, features, public
                )
            ),
        )
    if study.distill.on == "public":
        yield (
            "distill",
            _step_s(
                lambda steps: distill_publicly(
                    study.revised(distill__steps=steps), teacher, student, public
                )
            ),
        )


def _step_s(work: Callable[[int], Any]) -> float:
    """What a step takes, apart from what is done once."""
    work(_FEW_STEPS)
    few, more = _cpu_s(lambda: work(_FEW_STEPS)), _cpu_s(lambda: work(_MORE_STEPS))
    return max(0.0, more - few) / (_MORE_STEPS - _FEW_STEPS)
