"""Settings that refuse what they do not know, and say so in one line."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import StudyError, nearest


class Strict(BaseModel):
    """Frozen, and refuses what it does not know. Every setting in this code base is one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


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
    key = " ".join(".".join(str(part) for part in location).split())
    found = first.get("input")
    shown = repr(found) if not isinstance(found, dict | list) else f"a {type(found).__name__}"
    kind, context = first["type"], first.get("ctx", {})
    if kind == "extra_forbidden":
        parent = _model_at(model, location[:-1])
        known = list(parent.model_fields) if parent else []
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
    if kind == "value_error":
        return f"{key + ': ' if key else ''}{context['error']}"
    message = first["msg"].replace("Input should be", "expected")
    return f"{key}: {message[0].lower()}{message[1:]}, found {shown}"


def _model_at(model: type[Strict], location: list[str | int]) -> type[Strict] | None:
    """The model that owns the key at ``location``, followed through tuples and optionals."""
    current: Any = model
    for part in location:
        if isinstance(part, int):
            continue
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            return None
        current = _inner_model(field.annotation)
    return current if isinstance(current, type) and issubclass(current, Strict) else None


def _inner_model(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (inner := _inner_model(argument)) is not None:
            return inner
    return None
