"""What may go wrong in a simulated federation: one section, ``[simulation.scenario]``.

A scenario is not part of what binds the parties: a study has the same digest with and without it,
and a deployment ignores it. What cannot be is refused here, in one line that names what can.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from common.dictionary import Column
from common.errors import nearest
from common.labels import ClassLabel, Scalar
from common.privacy.units import Trust
from common.strict import Count, Fraction, NotNegative, Positive, Strict

if TYPE_CHECKING:
    from common.study import Study

Some = tuple[str, ...] | Count
"""Hospitals by name, or so many of them, drawn by the study's seed."""

DATA_ATTACKS = ("label_flip", "backdoor")
_OWN_KEYS = {
    "label_flip": ("patients_share",),
    "backdoor": ("patients_share", "trigger", "patch", "target_class"),
    "sign_flip": ("factor",),
    "scale": ("factor",),
    "wrong_vector": ("factor",),
}


class ParticipationSpec(Strict):
    """Only some hospitals are asked in a round of training, drawn anew each time.

    ``fraction`` of those that are there (rounded up), or so many ``hospitals``.
    """

    fraction: Fraction | None = None
    hospitals: Count | None = None

    @model_validator(mode="after")
    def _one_way_only(self) -> Self:
        if (self.fraction is None) == (self.hospitals is None):
            raise ValueError("give either fraction or hospitals, not both and not neither")
        return self

    def asked(self, present: int) -> int:
        """How many of ``present`` hospitals are asked."""
        if self.hospitals is not None:
            return min(self.hospitals, present)
        assert self.fraction is not None  # noqa: S101  (refused otherwise)
        return math.ceil(self.fraction * present - 1e-9)


class DropoutsSpec(Strict):
    """A hospital falls silent in a round, each with ``probability``.

    ``when``: ``before`` its work (nothing is charged), or ``after`` it: done and charged, but the
    reply is lost.
    """

    probability: Annotated[float, Field(gt=0, lt=1)]
    when: Literal["before", "after"] = "before"


class LateSpec(Strict):
    """Hospitals that are not there at first and join in round ``from_round`` of the fine-tuning.

    Rounds count from 1. ``hospitals``: names, or a number of them.
    """

    hospitals: Some
    from_round: Annotated[int, Field(ge=2)]


class NetworkSpec(Strict):
    """The line and the speed of every hospital, from which a run's duration is forecast.

    Bytes are those of the messages really sent. ``latency_ms``: of one request; each part of a
    message is one. ``records_per_s``: how many records a hospital takes through one step.
    """

    uplink_mbit_s: Positive = 10.0
    downlink_mbit_s: Positive = 10.0
    latency_ms: NotNegative = 20.0
    records_per_s: Positive = 2000.0


class StragglersSpec(Strict):
    """Hospitals of different speed, on a virtual clock; replies after ``deadline_s`` are dropped.

    Computing takes e^(``spread``·z) times longer at a hospital, always, and e^(``jitter``·z) times
    in a round, with z standard normal. A late hospital has done, and is charged, its work.
    """

    spread: NotNegative = 0.5
    jitter: NotNegative = 0.0
    deadline_s: Positive | None = None


class MissingColumnsSpec(Strict):
    """Some ``hospitals`` measure none of these ``columns``, which must be optional."""

    hospitals: Some
    columns: tuple[str, ...] = Field(min_length=1)


class AttackSpec(Strict):
    """Some ``hospitals`` attack; their own patients stay protected, the model may not be right.

    Poisoned records: ``label_flip`` (every label becomes the next class), ``backdoor`` (records
    with a ``trigger``, column = value, or for images a white ``patch`` of so many pixels, are
    labelled ``target_class``, a number from 0), each for ``patients_share`` of their training
    patients (default 1 and 0.5). Changed answers: ``sign_flip`` (update × −``factor``, default 1),
    ``scale`` (update × ``factor``, default 10), ``wrong_vector`` (a random one, ``factor`` times as
    long as an honest one; default 10).
    """

    kind: Literal["label_flip", "backdoor", "sign_flip", "scale", "wrong_vector"]
    hospitals: Some
    patients_share: Fraction | None = None
    trigger: dict[str, Scalar] = Field(default_factory=dict)
    patch: Count | None = None
    target_class: Annotated[int, Field(ge=0)] | None = None
    factor: Positive | None = None

    @model_validator(mode="after")
    def _keys_belong_to_the_kind(self) -> Self:
        given = {"patients_share", "trigger", "patch", "target_class", "factor"}
        given = {key for key in given if getattr(self, key) not in (None, {})}
        foreign = sorted(given - set(_OWN_KEYS[self.kind]))
        if foreign:
            kinds = [kind for kind, keys in _OWN_KEYS.items() if foreign[0] in keys]
            raise ValueError(
                f"{foreign[0]} belongs to kind {' or '.join(map(repr, kinds))}, "
                f"found kind = {self.kind!r}"
            )
        if self.kind == "backdoor":
            if self.target_class is None:
                raise ValueError("a backdoor needs target_class, a class by its number from 0")
            if bool(self.trigger) == (self.patch is not None):
                raise ValueError(
                    "a backdoor needs either trigger = { column = value } or, on images, patch"
                )
        return self

    @property
    def poisoned_share(self) -> float:
        """Of a hospital's training patients."""
        if self.patients_share is not None:
            return self.patients_share
        return 0.5 if self.kind == "backdoor" else 1.0

    @property
    def strength(self) -> float:
        """The factor, signed for ``sign_flip``."""
        if self.kind == "sign_flip":
            return -(self.factor or 1.0)
        return self.factor or 10.0


class ObserverSpec(Strict):
    """A curious coordinator guesses from the updates it sees who was trained on.

    It follows the protocol and knows everything else: all records, and all members but the
    ``candidates``, of whom at most so many are judged at each hospital, members and others each.
    """

    candidates: Count = 150


class ScenarioSpec(Strict):
    """Everything that may go wrong; a part that is left out does not happen.

    All draws follow from the study's seed, so that a run can be repeated and resumed.
    """

    participation: ParticipationSpec | None = None
    dropouts: DropoutsSpec | None = None
    late: LateSpec | None = None
    network: NetworkSpec = NetworkSpec()
    stragglers: StragglersSpec | None = None
    missing_columns: MissingColumnsSpec | None = None
    attack: AttackSpec | None = None
    observer: ObserverSpec | None = None


def check_scenario(study: Study) -> None:
    """Raise ValueError, in one line, for a scenario that this study cannot have."""
    simulation = study.simulation
    if simulation is None or simulation.scenario is None:
        return
    spec, names = simulation.scenario, simulation.names
    for part, some in (
        ("late", spec.late),
        ("missing_columns", spec.missing_columns),
        ("attack", spec.attack),
    ):
        if some is not None:
            _check_some(f"simulation.scenario.{part}.hospitals", some.hospitals, names)
    if spec.missing_columns is not None:
        _check_missing(study, spec.missing_columns)
    _check_presence(study, spec, len(names))
    label = study.dictionary.label
    if spec.attack is not None and not isinstance(label, ClassLabel):
        raise ValueError(
            f"simulation.scenario.attack: what an attack did is told by classes, found "
            f"dictionary.label.kind = {label.kind!r}; leave it out"
        )
    if spec.attack is not None and spec.attack.kind == "backdoor":
        assert isinstance(label, ClassLabel)  # noqa: S101
        _check_backdoor(study, spec.attack, len(label.classes))
    distributed = study.privacy.trust is Trust.DISTRIBUTED
    if distributed and spec.attack is not None and spec.attack.kind in ("sign_flip", "scale"):
        raise ValueError(
            f"simulation.scenario.attack.kind: {spec.attack.kind!r} needs single answers, which "
            f"trust = 'distributed' hides; poison data ('label_flip', 'backdoor'), send a "
            f"'wrong_vector', or set trust = 'local'"
        )
    if distributed and spec.observer is not None:
        raise ValueError(
            "simulation.scenario.observer reads single updates, and trust = 'distributed' has only "
            "their sum; set trust = 'local', or bound the sum's ε with `consilium audit privacy`"
        )


def _check_some(key: str, some: Some, names: tuple[str, ...]) -> None:
    if isinstance(some, int):
        if some > len(names):
            raise ValueError(f"{key}: expected at most {len(names)}, found {some}")
        return
    if not some or len(set(some)) != len(some):
        raise ValueError(f"{key}: expected one or more different names, found {list(some)}")
    for name in some:
        if name not in names:
            raise ValueError(f"{key}: no hospital {name!r}; {nearest(name, names)}")


def _check_presence(study: Study, spec: ScenarioSpec, hospitals: int) -> None:
    """Enough hospitals are there, and are asked, for a round to count."""
    federation, late = study.federation, 0
    least, why = federation.minimum_hospitals, "federation.minimum_hospitals"
    if study.privacy.trust is Trust.DISTRIBUTED and federation.hospitals is not None:
        remaining = federation.hospitals - federation.tolerated_dropouts
        if remaining > least:
            least, why = remaining, "federation.hospitals less tolerated_dropouts"
    if spec.late is not None:
        some = spec.late.hospitals
        late = some if isinstance(some, int) else len(some)
        if spec.late.from_round > study.finetune.rounds:
            raise ValueError(
                f"simulation.scenario.late.from_round: expected at most {study.finetune.rounds}, "
                f"the rounds of fine-tuning, found {spec.late.from_round}"
            )
        if hospitals - late < least:
            raise ValueError(
                f"simulation.scenario.late: expected at least {least} hospitals at the start "
                f"({why}), found {hospitals - late}; let fewer be late"
            )
    if spec.participation is not None:
        asked = spec.participation.asked(hospitals - late)
        if asked < least:
            raise ValueError(
                f"simulation.scenario.participation: expected to ask at least {least} hospitals "
                f"({why}), found {asked}; ask more or lower that"
            )


def _check_missing(study: Study, spec: MissingColumnsSpec) -> None:
    key = "simulation.scenario.missing_columns.columns"
    for name in spec.columns:
        column = column_named(study, name, key)
        if column.kind in ("image", "text", "molecule") or not column.optional:
            raise ValueError(
                f"{key}: {name!r} is not optional; set optional = true in its "
                f"[[dictionary.columns]] entry, or name another"
            )


def _check_backdoor(study: Study, spec: AttackSpec, classes: int) -> None:
    key = "simulation.scenario.attack"
    if spec.target_class is not None and spec.target_class >= classes:
        raise ValueError(
            f"{key}.target_class: classes count from 0 to {classes - 1}, found {spec.target_class}"
        )
    shape = study.dictionary.image_shape
    if (shape is not None) != (spec.patch is not None):
        raise ValueError(
            f"{key}: expected {'patch' if shape else 'trigger'} for task = {study.task!r}, "
            f"found {'trigger' if shape else 'patch'}"
        )
    if shape is not None and spec.patch is not None and spec.patch > min(shape):
        raise ValueError(f"{key}.patch: expected at most {min(shape)} pixels, found {spec.patch}")
    for name, value in spec.trigger.items():
        column = column_named(study, name, f"{key}.trigger")
        if column.range is not None:
            low, high = column.range
            if not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(
                    f"{key}.trigger.{name}: expected a number from {low:g} to {high:g}, "
                    f"found {value!r}"
                )
        elif value not in column.categories:
            raise ValueError(
                f"{key}.trigger.{name}: expected one of {list(column.categories)}, found {value!r}"
            )


def column_named(study: Study, name: str, key: str) -> Column:
    """The column ``name``; raises ValueError, naming the nearest one, when there is none."""
    columns = {one.name: one for one in study.dictionary.columns}
    if name not in columns:
        raise ValueError(f"{key}: no column {name!r}; {nearest(name, columns)}")
    return columns[name]
