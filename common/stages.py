"""The stages of a study, as its file says them: what learns, from what, in which steps."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.modelspec import LoraSpec
from common.strict import Count, Fraction, Positive, Strict


class OptimiserSpec(Strict):
    """How a gradient becomes a step. See docs/optimisers.md for how to choose."""

    kind: Literal["sgd", "momentum", "adam", "adamw"] = "sgd"
    learning_rate: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "cosine", "plateau"] = "constant"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0


class PretrainSpec(Strict):
    """Self-supervised learning on the public corpus, at the coordinator.

    ``mask_rate``: the share of columns (or image patches) hidden and to be reconstructed.
    ``steps = 0`` leaves the teacher at its random start (the ablation).
    """

    steps: Annotated[int, Field(ge=0)] = 400
    batch: Count = 64
    mask_rate: Fraction = 0.3
    optimiser: OptimiserSpec


class AugmentSpec(Strict):
    """Random views of an image, drawn from these public ranges: turned by up to ``rotation_deg``
    degrees and moved by up to ``shift`` pixels either way; with ``flip`` mirrored half of the time.
    """

    shift: Annotated[float, Field(ge=0)] = 2.0
    rotation_deg: Annotated[float, Field(ge=0, le=180)] = 10.0
    flip: bool = False


class FinetuneSpec(Strict):
    """The teacher learns from patients, at the hospitals.

    ``trainable``: ``head`` (the pre-trained encoder stays frozen), ``lora`` (it stays frozen under
    low-rank corrections, as ``lora`` says, which learn with the head) or ``all``.
    ``augment``: images are seen as random views; ``views`` of each in one step, whose gradients
    are averaged before the patient is clipped, so that they cost no more (De et al. 2022,
    arXiv 2204.13650).
    """

    rounds: Count
    local_steps: Count = 1
    sampling_rate: Fraction = 1.0
    trainable: Literal["head", "lora", "all"] = "head"
    lora: LoraSpec | None = None
    augment: AugmentSpec | None = None
    views: Count = 1
    optimiser: OptimiserSpec

    @model_validator(mode="after")
    def _lora_is_asked_for(self) -> Self:
        if (self.lora is not None) != (self.trainable == "lora"):
            raise ValueError(
                f"[finetune.lora] belongs to trainable = 'lora', and only to it (it may be empty); "
                f"found trainable = {self.trainable!r}"
            )
        return self

    @model_validator(mode="after")
    def _views_differ(self) -> Self:
        if self.views > 1 and self.augment is None:
            raise ValueError(
                f"views = {self.views} of a record would be the same one; add [finetune.augment]"
            )
        if self.augment is not None and self.trainable == "head":
            raise ValueError(
                "[finetune.augment] needs trainable = 'all': a frozen encoder turns each record "
                "into one code, once"
            )
        return self

    @property
    def releases(self) -> int:
        """Noised steps over the whole stage."""
        return self.rounds * self.local_steps


class DistillSpec(Strict):
    """The student learns to answer as the teacher does.

    ``on = "public"``: at the coordinator, on the public corpus and mixtures of it; free.
    ``on = "patients"``: at the hospitals, as ``rounds`` × ``local_steps`` charged steps.
    ``temperature`` softens the targets (Hinton et al. 2015, arXiv 1503.02531).
    ``augment``: public images are seen as random views, by teacher and student alike.
    ``excerpts``: each public text is joined by so many random stretches of itself.
    """

    on: Literal["public", "patients"] = "public"
    temperature: Positive = 2.0
    steps: Count = 600
    batch: Count = 128
    rounds: Count = 10
    local_steps: Count = 1
    sampling_rate: Fraction = 1.0
    augment: AugmentSpec | None = None
    excerpts: Annotated[int, Field(ge=0)] = 0
    optimiser: OptimiserSpec

    @model_validator(mode="after")
    def _views_are_public(self) -> Self:
        if self.augment is not None and self.on == "patients":
            raise ValueError("[distill.augment] belongs to on = 'public'; leave it out")
        if self.excerpts and self.on == "patients":
            raise ValueError("distill.excerpts belongs to on = 'public'; leave it out")
        return self

    @property
    def releases(self) -> int:
        """Noised steps over the whole stage; none on public data."""
        return self.rounds * self.local_steps if self.on == "patients" else 0
