"""The reference pages, generated from the code so that they cannot go stale.

``python -m simulations.reference FOLDER`` writes ``commands.md`` and ``study-file.md``.
"""

from __future__ import annotations

import inspect
import sys
import typing
from enum import StrEnum
from pathlib import Path
from typing import Any

import click
import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from common.dictionary import Column, Dictionary
from common.labels import (
    ClassLabel,
    EffectLabel,
    NumberLabel,
    SeveralLabel,
    SurvivalLabel,
    TextLabel,
)
from common.modelspec import MODELS, kind_of
from common.scenario import (
    AttackSpec,
    DropoutsSpec,
    LateSpec,
    MissingColumnsSpec,
    NetworkSpec,
    ObserverSpec,
    ParticipationSpec,
    ScenarioSpec,
    StragglersSpec,
)
from common.simulation import HospitalData, SimulationSpec, SitesSpec
from common.sources import (
    ClinicalColumn,
    ColumnMapping,
    CsvSource,
    DicomSource,
    FhirSource,
    ImagesSource,
    Interval,
    LabelTable,
    NpzSource,
    ParquetSource,
    SklearnSource,
)
from common.stages import AugmentSpec, DistillSpec, FinetuneSpec, OptimiserSpec, PretrainSpec
from common.strict import Strict
from common.study import EvaluationSpec, FederationSpec, PrivacySpec, PublicSpec, Study

_SECTIONS: tuple[tuple[str, type[Strict]], ...] = (
    ("top level", Study),
    ("[simulation]", SimulationSpec),
    ("[simulation.sites]", SitesSpec),
    ("[[simulation.hospital]]", HospitalData),
    ("[simulation.scenario]", ScenarioSpec),
    ("[simulation.scenario.participation]", ParticipationSpec),
    ("[simulation.scenario.dropouts]", DropoutsSpec),
    ("[simulation.scenario.late]", LateSpec),
    ("[simulation.scenario.network]", NetworkSpec),
    ("[simulation.scenario.stragglers]", StragglersSpec),
    ("[simulation.scenario.missing_columns]", MissingColumnsSpec),
    ("[simulation.scenario.attack]", AttackSpec),
    ("[simulation.scenario.observer]", ObserverSpec),
    ("source of any kind", ColumnMapping),
    ("source of kind csv", CsvSource),
    ("source of kind parquet", ParquetSource),
    ("source of kind npz", NpzSource),
    ("source of kind sklearn", SklearnSource),
    ("source of kind fhir", FhirSource),
    ("columns of kind fhir", ClinicalColumn),
    ("source of kind dicom", DicomSource),
    ("source of kind images", ImagesSource),
    ("labels of images", LabelTable),
    ("derive of a source", Interval),
    ("[public]", PublicSpec),
    *((f"[teacher], [student], kind = {kind_of(one)!r}", one) for one in MODELS),
    ("optimiser of a stage", OptimiserSpec),
    ("[pretrain]", PretrainSpec),
    ("[finetune]", FinetuneSpec),
    ("[distill]", DistillSpec),
    ("[finetune.augment], [distill.augment]", AugmentSpec),
    ("[privacy]", PrivacySpec),
    ("[federation]", FederationSpec),
    ("[evaluation]", EvaluationSpec),
    ("[dictionary]", Dictionary),
    ("[dictionary.label], kind = 'classes'", ClassLabel),
    ("[dictionary.label], kind = 'survival'", SurvivalLabel),
    ("[dictionary.label], kind = 'number'", NumberLabel),
    ("[dictionary.label], kind = 'effect'", EffectLabel),
    ("[dictionary.label], kind = 'several'", SeveralLabel),
    ("[dictionary.label], kind = 'text'", TextLabel),
    ("[[dictionary.columns]]", Column),
)


def study_reference() -> str:
    """Every section and key of a study file."""
    lines = [
        "# The study file",
        "",
        "Generated from the code: `python -m simulations.reference "
        "docs`. Commented examples lie in `deploy/examples/`.",
        "",
    ]
    for title, model in _SECTIONS:
        doc = inspect.cleandoc(model.__doc__ or "")
        lines += [f"## {title}", "", doc, "", "| key | values | default |", "|---|---|---|"]
        shared = ColumnMapping.model_fields if model.__bases__ != (Strict,) else {}
        for name, field in model.model_fields.items():
            if name not in shared:
                lines.append(f"| `{name}` | {value_words(field)} | {default_words(field)} |")
        lines.append("")
    return "\n".join(lines)


def command_reference(app: typer.Typer) -> str:
    """Every command with its help and its example."""
    lines = [
        "# Commands",
        "",
        "Generated from the code: `python -m simulations.reference docs`. "
        "Each command also answers to `--help`.",
        "",
    ]
    root = typer.main.get_command(app)
    for path, command in walk(root, ("consilium",)):
        lines += [f"## {' '.join(path)}", "", (command.help or "").strip(), ""]
        for parameter in command.params:
            if isinstance(parameter, click.Argument) or parameter.name == "help":
                continue
            options = ", ".join(f"`{name}`" for name in parameter.opts)
            lines.append(f"- {options}: {getattr(parameter, 'help', '') or ''}")
        if command.epilog:
            lines += ["", command.epilog.replace("Example: ", "Example: `") + "`"]
        lines.append("")
    return "\n".join(lines)


def walk(
    command: click.Command, path: tuple[str, ...]
) -> typing.Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below ``command``, groups first."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from walk(child, (*path, name))


def value_words(field: FieldInfo) -> str:
    """Which values a key takes."""
    return _words(field.annotation)


def _words(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is typing.Annotated:
        return _words(arguments[0])
    if origin in (tuple, list):
        return "list of " + _words(arguments[0])
    if arguments and origin is not dict:
        words = (_words(one) for one in arguments if one is not type(None))
        return " or ".join(dict.fromkeys(words))
    if inspect.isclass(annotation) and issubclass(annotation, StrEnum):
        return ", ".join(f"`{one.value}`" for one in annotation)
    return _plain(annotation)


def _plain(annotation: Any) -> str:
    names = {
        "float": "number",
        "int": "whole number",
        "str": "text",
        "bool": "true or false",
        "dict": "table",
    }
    name = getattr(annotation, "__name__", str(annotation))
    return names.get(name, "section" if inspect.isclass(annotation) else name)


def default_words(field: FieldInfo) -> str:
    """What a key is when it is left out."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or value is PydanticUndefined or value in ((), {}):
        return "—"
    if isinstance(value, Strict):
        return "its own defaults"
    if isinstance(value, tuple):
        return ", ".join(f"`{one}`" for one in value if one != "") or "—"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`" if value != "" else "—"


def main() -> None:
    """Write both pages into the folder named on the command line."""
    from simulations.cli import app  # noqa: PLC0415  (the command line imports much)

    folder = Path(sys.argv[1])
    (folder / "study-file.md").write_text(study_reference(), encoding="utf-8")
    (folder / "commands.md").write_text(command_reference(app), encoding="utf-8")


if __name__ == "__main__":
    main()
