"""Settings that refuse what they do not know, and say so in one line."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar, get_origin

from pydantic import BaseModel, ConfigDict, Discriminator, Field, ValidationError

from common.errors import StudyError, nearest

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    """Frozen, and refuses what it does not know. Every setting in this code base is one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def told_by_kind(default: str) -> Discriminator:
    """Models told apart by their key ``kind``, which is ``default`` where it is left out."""

    def kind(given: Any) -> str:
        if isinstance(given, dict):
            return str(given.get("kind", default))
        return str(getattr(given, "kind", ""))

    return Discriminator(kind)


Model = TypeVar("Model", bound=Strict)


def parse_strict(model: type[Model], tree: dict[str, Any], *, origin: str) -> Model:
    """Validate ``tree`` as ``model``; the first error becomes one line."""
    try:
        # JSON mode: strict about types, yet lists become tuples and words become enums.
        return model.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise StudyError(f"{origin}: {_one_line(model, error)}") from None


def _one_line(model: type[Strict], error: ValidationError) -> str:
    # A mistyped key also leaves the right one missing; the mistyping is the thing to say.
    rank = {"extra_forbidden": 0, "missing": 2}
    first = min(error.errors(include_url=False), key=lambda one: rank.get(one["type"], 1))
    location = list(first["loc"])
    # pydantic also names the model it chose among several by `kind`; nobody wrote that.
    written = [
        part
        for position, part in enumerate(location)
        if not isinstance(_at(model, location[:position]), dict)
    ]
    key = " ".join(".".join(str(part) for part in written).split())
    found = first.get("input")
    shown = repr(found) if not isinstance(found, dict | list) else f"a {type(found).__name__}"
    kind, context = first["type"], first.get("ctx", {})
    if kind == "extra_forbidden":
        parent = _at(model, location[:-1])
        known = list(getattr(parent, "model_fields", {}))
        return f"{key}: unknown key; {nearest(str(location[-1]), known)}"
    if kind in ("literal_error", "enum"):
        choices = [
            word.strip().strip("'") for word in context["expected"].replace(" or ", ", ").split(",")
        ]
        return (
            f"{key}: expected one of {', '.join(choices)}, found {shown}; "
            f"{nearest(str(found), choices)}"
        )
    if kind == "missing":
        return f"{key}: missing, and it has no default"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return f"{key}.{_about_tag(context)}"
    message = first["msg"].replace("Input should be", "expected")
    plain = f"{key}: {message[0].lower()}{message[1:]}, found {shown}"
    return f"{key + ': ' if key else ''}{context['error']}" if kind == "value_error" else plain


def _about_tag(context: dict[str, Any]) -> str:
    """One of several models was meant, told apart by a key such as `kind`."""
    field = context["discriminator"].strip("'")
    field = "kind" if field.endswith("()") else field  # a function that reads it
    if "tag" not in context:
        return f"{field}: missing, and it has no default"
    choices = [word.strip().strip("'") for word in context["expected_tags"].split(",")]
    return (
        f"{field}: expected one of {', '.join(choices)}, found {context['tag']!r}; "
        f"{nearest(context['tag'], choices)}"
    )


def _at(model: type[Strict], location: list[str | int]) -> Any:
    """The model that owns the keys at ``location``, followed through tuples and optionals.

    Where several are possible, a dict of them by their ``kind``; None where there is no model.
    """
    current: Any = model
    in_table = False
    for part in location:
        if in_table or isinstance(part, int):
            in_table = False  # a name that the user chose, or a position
        elif isinstance(current, dict):
            current = current.get(part)
        else:
            field = getattr(current, "model_fields", {}).get(part)
            current = None if field is None else _model_of(field.annotation)
            in_table = field is not None and get_origin(field.annotation) is dict
    return current


def _model_of(annotation: Any) -> Any:
    models = _models_in(annotation)
    if len(models) < 2:
        return models[0] if models else None
    return {one.model_fields["kind"].annotation.__args__[0]: one for one in models}


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return [annotation]
    return [one for each in getattr(annotation, "__args__", ()) for one in _models_in(each)]
