"""Where a simulation's hospitals come from: the section ``[simulation]`` of a study file.

It binds nobody: a study has the same digest with and without it, and a deployment ignores it.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.scenario import ScenarioSpec
from common.sources import SourceSpec
from common.strict import Count, Positive, Strict


class HospitalData(Strict):
    """One hospital of a simulation with natural sites. ``name`` also names its folder."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    source: SourceSpec


class SitesSpec(Strict):
    """A table that says in which hospital each patient was: columns ``patient`` and ``site``."""

    path: str = Field(min_length=1)
    patient: str = Field(min_length=1)
    site: str = Field(min_length=1)


class SimulationSpec(Strict):
    """Where a simulation's hospitals come from; a deployment ignores it.

    Either ``hospital`` entries (natural sites), or one ``source`` cut into ``hospitals`` parts by
    ``partition``: ``equal``, ``power_law`` (sizes ∝ rank to the power −``exponent``),
    ``label_skew`` (class shares by a Dirichlet law of ``concentration``, Hsu et al. 2019),
    ``covariate_shift`` (the same law deals out the quarters of ``column``, or its categories),
    ``scaffold`` (molecules with one scaffold stay together, the most frequent dealt out first), or
    ``sites`` (as the table ``sites`` says, whose hospitals must be ``hospitals`` in number).
    ``scenario``: what else may go wrong; see docs/scenarios.md.
    """

    hospital: tuple[HospitalData, ...] = ()
    source: SourceSpec | None = None
    hospitals: Count | None = None
    partition: Literal[
        "equal", "power_law", "label_skew", "covariate_shift", "scaffold", "sites"
    ] = "equal"
    sites: SitesSpec | None = None
    exponent: Annotated[float, Field(ge=0)] = 1.0
    concentration: Positive = 0.5
    column: str | None = None
    scenario: ScenarioSpec | None = None

    @model_validator(mode="after")
    def _one_way_only(self) -> Self:
        if bool(self.hospital) == (self.source is not None):
            raise ValueError(
                "give either [[simulation.hospital]] entries or one [simulation.source], "
                "not both and not neither"
            )
        if (self.source is not None) != (self.hospitals is not None):
            raise ValueError("hospitals = N belongs to [simulation.source], and only to it")
        if (self.partition == "sites") != (self.sites is not None):
            raise ValueError("[simulation.sites] belongs to partition = 'sites', and only to it")
        if (self.partition == "covariate_shift") != (self.column is not None):
            raise ValueError("column belongs to partition = 'covariate_shift', and only to it")
        names = [hospital.name for hospital in self.hospital]
        if len(set(names)) != len(names):
            raise ValueError(f"hospital names must differ, found {names}")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The hospitals' names; those of a cut table are numbered."""
        if self.hospitals is None:
            return tuple(one.name for one in self.hospital)
        width = len(str(self.hospitals))
        return tuple(f"hospital-{number:0{width}d}" for number in range(1, self.hospitals + 1))
