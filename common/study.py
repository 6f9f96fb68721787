"""The study file: one TOML text that says everything about a study.

Parsed into frozen, fully validated objects. What is unknown or impossible is refused in one line
that names the key, what was expected, what was found and the nearest valid choice.
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import Field, model_validator

from common.dictionary import Dictionary
from common.errors import StudyError
from common.modelspec import (
    MODELS,
    ComponentsSpec,
    MlpSpec,
    ModelSpec,
    PretrainedSpec,
    kind_of,
)
from common.privacy.units import PrivacyUnit, Relation, Trust
from common.scenario import check_scenario, column_named
from common.simulation import SimulationSpec
from common.sources import TableSource
from common.stages import DistillSpec, FinetuneSpec, PretrainSpec
from common.strict import Count, Positive, Strict, parse_strict

# TOML carries words, the code carries types; strict mode would refuse the conversion.
UnitField = Annotated[PrivacyUnit, Field(strict=False)]
RelationField = Annotated[Relation, Field(strict=False)]
TrustField = Annotated[Trust, Field(strict=False)]


class PublicSpec(Strict):
    """The public corpus: records with no privacy claim, and without labels.

    ``held_apart``: a simulation sets this fraction of patients aside before the hospitals exist.
    ``file``: a table at the coordinator (csv, parquet or npz), read by the study's dictionary.
    ``dictionary``: records drawn from the dictionary's ranges alone; no patient at all.
    """

    kind: Literal["held_apart", "file", "dictionary"] = "dictionary"
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    records: Count = 512
    source: TableSource | None = None

    @model_validator(mode="after")
    def _file_has_source(self) -> Self:
        if (self.kind == "file") != (self.source is not None):
            raise ValueError("[public.source] belongs to kind = 'file', and only to it")
        return self


class PrivacySpec(Strict):
    """The promise. ``epsilon`` covers all rounds and stages together.

    ``spare_attempts``: rounds of secure aggregation that may fail after hospitals' masked vectors
    left and be tried again; each is budgeted beforehand (``trust = "distributed"``), as many for
    training, for private scaling and for the evaluation.
    ``statistics_share``: the part of the budget (as a share of squared signal-to-noise) spent on
    private scaling when ``scaling = "private"``.
    """

    unit: UnitField = PrivacyUnit.PATIENT
    relation: RelationField = Relation.ADD_REMOVE
    trust: TrustField = Trust.LOCAL
    epsilon: Positive | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    clip_norm: Positive = 1.0
    records_per_patient: Count = 8
    spare_attempts: Annotated[int, Field(ge=0)] = 0
    statistics_share: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _promise_is_complete(self) -> Self:
        if self.trust is Trust.NONE:
            if self.epsilon is not None or self.delta is not None:
                raise ValueError(
                    "trust = 'none' makes no promise: leave out epsilon and delta, "
                    "or set trust = 'local'"
                )
        elif self.epsilon is None or self.delta is None:
            raise ValueError(f"trust = {self.trust.value!r} needs both epsilon and delta")
        if self.unit is PrivacyUnit.RECORD and "records_per_patient" in self.model_fields_set:
            raise ValueError(
                "records_per_patient has no meaning with unit = 'record'; "
                "leave it out or set unit = 'patient'"
            )
        return self


class FederationSpec(Strict):
    """How hospitals' updates become one.

    ``weighting``: ``declared`` uses the number of patients each hospital declares in public
    (rounded, by itself); ``uniform`` counts hospitals alike. True counts never leave.
    ``hospitals``, ``tolerated_dropouts``, ``tolerated_colluders``: with ``trust = "distributed"``,
    how many hospitals are enrolled, how many may vanish in a round, and how many may work with the
    coordinator. Each adds its share of the noise for the honest ones that then remain.
    ``tail_average``: the share of the last rounds whose models are averaged; free, and under
    noise usually better than the last one alone (Polyak & Juditsky 1992).
    ``ema``: or all rounds' models are averaged, each counting so many times as much as the next:
    an exponential moving average, free as well (De et al. 2022, arXiv 2204.13650).
    """

    rule: Literal["fedavg", "fedavgm", "fedadam", "fedyogi", "fedprox"] = "fedavg"
    server_learning_rate: Positive = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.99
    tau: Positive = 1e-3
    proximal_mu: Annotated[float, Field(ge=0)] = 0.0
    weighting: Literal["declared", "uniform"] = "declared"
    tail_average: Annotated[float, Field(ge=0, le=1)] = 0.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    minimum_hospitals: Count = 2
    hospitals: Annotated[int, Field(ge=2)] | None = None
    tolerated_dropouts: Annotated[int, Field(ge=0)] = 0
    tolerated_colluders: Annotated[int, Field(ge=0)] = 1
    round_timeout_s: Positive = 3600.0

    @model_validator(mode="after")
    def _mu_belongs_to_fedprox(self) -> Self:
        if (self.rule == "fedprox") != (self.proximal_mu > 0):
            raise ValueError(
                f"proximal_mu above 0 belongs to rule = 'fedprox', and only to it; "
                f"found rule = {self.rule!r} and proximal_mu = {self.proximal_mu}"
            )
        return self

    @model_validator(mode="after")
    def _one_average(self) -> Self:
        if self.ema and self.tail_average:
            raise ValueError(
                f"ema and tail_average are two averages of the same models: give one, found "
                f"{self.ema} and {self.tail_average}"
            )
        return self


class EvaluationSpec(Strict):
    """Each hospital keeps one of ``folds`` equal parts of its patients for testing.

    ``split``: how they fall into parts: ``random`` (each label in equal share), or ``scaffold`` for
    molecules, whole scaffolds: part 0 the rarest ones, as in MoleculeNet (docs/molecules.md).
    Exact scores stay at the hospital. With ``epsilon`` a noised histogram of scores by label is
    released once, charged to the test patients (who are never trained on): one of each hospital,
    or with ``trust = "distributed"`` a single one of all hospitals together.
    """

    folds: Annotated[int, Field(ge=2)] = 4
    fold: Annotated[int, Field(ge=0)] = 0
    split: Literal["random", "scaffold"] = "random"
    epsilon: Positive | None = None
    bins: Annotated[int, Field(ge=2, le=100)] = 20

    @model_validator(mode="after")
    def _fold_exists(self) -> Self:
        if self.fold >= self.folds:
            raise ValueError(f"fold counts from 0 to {self.folds - 1}, found {self.fold}")
        return self


class Study(Strict):
    """A whole study. See deploy/examples/ for commented files."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    task: str
    seed: Annotated[int, Field(ge=0)] = 0
    scaling: Literal["ranges", "public", "private"] = "ranges"
    dictionary: Dictionary
    public: PublicSpec = PublicSpec()
    teacher: ModelSpec
    student: ModelSpec
    pretrain: PretrainSpec
    finetune: FinetuneSpec
    distill: DistillSpec
    privacy: PrivacySpec
    federation: FederationSpec = FederationSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    simulation: SimulationSpec | None = None

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        from common.tasks import task_named  # noqa: PLC0415 (torch: only who reads a study needs it)

        task = task_named(self.task, self.dictionary)
        modality, asks = self.dictionary.modality, self.dictionary.asks
        for role, spec in (("teacher", self.teacher), ("student", self.student)):
            if asks not in spec.reads:
                fitting = [one for one in MODELS if asks in one.reads]
                names = " or ".join(repr(kind_of(one)) for one in fitting)
                raise ValueError(
                    f"{role}.kind: expected {names} for records of kind {asks}, found {spec.kind!r}"
                )
        if isinstance(self.student, MlpSpec) and self.student.skip:
            raise ValueError("student.skip: a student is one plain network; leave it out")
        if modality != "table" and self.scaling != "ranges":
            raise ValueError(
                f"scaling: expected 'ranges' for {modality}s (their scale is public), "
                f"found {self.scaling!r}"
            )
        released = task.release_shape(self.evaluation.bins)
        if self.evaluation.epsilon is not None and not math.prod(released):
            raise ValueError(
                f"evaluation.epsilon: nothing of an evaluation leaves under task = {self.task!r}; "
                f"leave it out"
            )
        if self.scaling == "public" and self.public.kind == "dictionary":
            raise ValueError(
                "scaling = 'public' needs a public corpus of real records: set public.kind to "
                "'held_apart' or 'file', or scaling = 'ranges'"
            )
        if self.public.kind == "dictionary" and modality != "table":
            raise ValueError(
                f"public.kind = 'dictionary' cannot draw {modality}s: set 'held_apart' or 'file'"
            )
        self._check_molecules()
        columns = self.dictionary.columns
        keeping = [column.name for column in columns if column.keep is not None]
        if self.scaling == "private" and not (
            keeping or any(column.kind == "numeric" for column in columns)
        ):
            raise ValueError(
                "scaling = 'private' needs a numeric column to scale, or a code column that keeps "
                "some of its buckets; did you mean 'ranges'?"
            )
        if keeping and self.scaling == "ranges":
            raise ValueError(
                f"dictionary.columns: {keeping[0]!r} keeps its most frequent codes, which must be "
                f"found: set scaling = 'private' or 'public', or leave keep out"
            )
        for stage, optimiser, private in (
            ("finetune", self.finetune.optimiser, True),
            ("distill", self.distill.optimiser, self.distill.on == "patients"),
        ):
            if private and optimiser.schedule == "plateau":
                raise ValueError(
                    f"{stage}.optimiser.schedule: 'plateau' watches a loss, and a loss on patients "
                    f"would have to be charged; did you mean 'cosine'?"
                )
        if self.privacy.delta is not None and self.privacy.delta >= 1e-2:
            raise ValueError(
                f"privacy.delta: expected far below 1 / patients (1e-5 is usual), "
                f"found {self.privacy.delta}"
            )
        return self

    def _check_molecules(self) -> None:
        column = self.dictionary.columns[0]
        if column.kind == "molecule":
            kinds = (self.teacher.kind, self.student.kind)
            for kind, field, size in (
                ("graph", "atoms", column.atoms),
                ("transformer", "tokens", column.tokens),
            ):
                if kind in kinds and not size:
                    raise ValueError(
                        f"kind = {kind!r} needs {field} = N, the most {field} that it reads of a "
                        f"molecule, in the [[dictionary.columns]] entry of {column.name!r}"
                    )
            return
        for key, found in (
            ("evaluation.split", self.evaluation.split),
            ("simulation.partition", self.simulation and self.simulation.partition),
        ):
            if found == "scaffold":
                raise ValueError(f"{key}: 'scaffold' needs a molecule, found {column.kind} columns")

    @model_validator(mode="after")
    def _views_suit_the_records(self) -> Self:
        for stage, spec in (("finetune", self.finetune), ("distill", self.distill)):
            if spec.augment is not None and self.dictionary.modality != "image":
                raise ValueError(f"[{stage}.augment] turns and moves images; leave it out")
        if self.distill.excerpts and self.dictionary.modality != "text":
            raise ValueError("distill.excerpts are stretches of texts; leave it out")
        return self

    @model_validator(mode="after")
    def _pretrained_stays(self) -> Self:
        changed = self.finetune.trainable == "all" or self.pretrain.steps > 0
        if isinstance(self.teacher, PretrainedSpec) and changed:
            raise ValueError(
                f"teacher.kind = 'pretrained' comes trained and stays as it is: expected "
                f"pretrain.steps = 0 and finetune.trainable 'head' or 'lora', found "
                f"{self.pretrain.steps} and {self.finetune.trainable!r}"
            )
        if isinstance(self.teacher, ComponentsSpec) and self.pretrain.steps > 0:
            raise ValueError(
                f"teacher.kind = 'components' is worked out from the public records, not trained "
                f"on them: expected pretrain.steps = 0, found {self.pretrain.steps}"
            )
        if isinstance(self.student, PretrainedSpec | ComponentsSpec):
            fitting = "transformer" if isinstance(self.student, PretrainedSpec) else "mlp"
            raise ValueError(
                f"student.kind: {self.student.kind!r} is for teachers, a student is small; did you "
                f"mean {fitting!r}?"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_is_protected(self) -> Self:
        if self.privacy.trust is Trust.NONE and self.evaluation.epsilon is not None:
            raise ValueError(
                "evaluation.epsilon has no meaning with trust = 'none', which adds no noise; "
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def _scenario_can_be(self) -> Self:
        if self.simulation is not None and self.simulation.column is not None:
            column = column_named(self, self.simulation.column, "simulation.column")
            if column.kind in ("image", "text", "molecule"):
                raise ValueError(
                    f"simulation.column: {column.kind}s have no quarters; name a number"
                )
        check_scenario(self)
        return self

    @model_validator(mode="after")
    def _sums_suffice(self) -> Self:
        """What only works with single updates is refused where only their sum exists."""
        if self.privacy.trust is not Trust.DISTRIBUTED:
            return self
        federation = self.federation
        if federation.hospitals is None:
            raise ValueError(
                "trust = 'distributed' needs federation.hospitals, the number enrolled"
            )
        survivors = federation.hospitals - federation.tolerated_dropouts
        if 2 * survivors <= federation.hospitals + federation.tolerated_colluders or (
            federation.tolerated_colluders > survivors - 2
        ):
            raise ValueError(
                f"federation: {federation.tolerated_dropouts} dropouts and "
                f"{federation.tolerated_colluders} colluders are too many for "
                f"{federation.hospitals} hospitals; lower one of them"
            )
        stages = [("finetune", self.finetune.local_steps, self.finetune.optimiser.kind)]
        if self.distill.on == "patients":
            stages.append(("distill", self.distill.local_steps, self.distill.optimiser.kind))
        for stage, local_steps, kind in stages:
            if local_steps != 1 or kind != "sgd":
                raise ValueError(
                    f"{stage}: trust = 'distributed' sums one step of all hospitals at a time: set "
                    f"local_steps = 1 and optimiser kind 'sgd' (the server carries momentum), "
                    f"found {local_steps} and {kind!r}"
                )
        for key, found, wanted in (
            ("federation.weighting", federation.weighting, "declared"),
            ("federation.rule", federation.rule == "fedprox", False),
        ):
            if found != wanted:
                raise ValueError(
                    f"{key}: this choice needs single updates, and trust = 'distributed' has only "
                    f"their sum; set trust = 'local' or another {key}"
                )
        return self

    def training(self, stage: str) -> FinetuneSpec | DistillSpec:
        """The settings of a stage that trains: ``finetune`` or ``distill``."""
        return self.finetune if stage == "finetune" else self.distill

    def __hash__(self) -> int:
        """By its digest, which is found once: budgets are looked up by study at every release."""
        return hash(self._own_digest)

    def digest(self) -> str:
        """SHA-256 of what binds the parties: the study without its simulation section."""
        return self._own_digest

    @cached_property
    def _own_digest(self) -> str:
        return _digest(self.model_dump(mode="json", exclude={"simulation"}))

    def revised(self, **changes: Any) -> Study:
        """A validated copy; keys are dotted with ``__``: ``revised(privacy__epsilon=1.0)``.

        A value of None removes the key.
        """
        tree = self.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        for path, value in changes.items():
            *parents, leaf = path.split("__")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            if value is None:
                node.pop(leaf, None)
            else:
                node[leaf] = value
        return parse_study(tree, origin=self.name)

    def to_toml(self) -> str:
        """The resolved study, defaults spelled out, as TOML that parses to the same study."""
        return tomli_w.dumps(
            self.model_dump(mode="json", exclude_none=True, exclude_defaults=False)
            | self._unset_conflicts()
        )

    def _unset_conflicts(self) -> dict[str, Any]:
        # A key that is refused together with another must stay out when it was not given.
        if self.privacy.unit is PrivacyUnit.RECORD:
            privacy = self.privacy.model_dump(mode="json", exclude_none=True)
            privacy.pop("records_per_patient")
            return {"privacy": privacy}
        return {}


def load_study(path: Path) -> Study:
    """Read and validate a study file. Raises StudyError in one line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StudyError(f"{path}: no such study file; see deploy/examples/ for some") from None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: cannot be read as text ({error})") from None
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"{path}: not valid TOML: {error}") from None
    return parse_study(tree, origin=str(path))


def parse_study(tree: dict[str, Any], *, origin: str) -> Study:
    """Validate an already parsed study."""
    return parse_strict(Study, tree, origin=origin)


def _digest(tree: dict[str, Any]) -> str:
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
