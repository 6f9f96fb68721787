"""Settings to be tried, and every combination of them as a whole, validated study."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import StudyError
from common.strict import Strict
from common.study import Study

_LARGEST = 10_000  # combinations: more is a slip of the pen
_LONGEST_NAME = 120
_APART = {
    "name": "a sweep's combinations are named by their settings",
    "seed": "a sweep's seeds are set by --seeds",
}


@dataclass(frozen=True)
class Setting:
    """One key of the study file, dotted, and the values to try."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Combination:
    """One choice for each setting, and the study with it. ``arm`` names its runs' folder."""

    arm: str
    settings: Mapping[str, Any]
    study: Study


def parse_settings(texts: Sequence[str]) -> tuple[Setting, ...]:
    """``KEY=VALUE,VALUE,…``, each value as in a study file; a word needs no quotes.

    Raises StudyError on a key that no study has, naming the nearest, and on what is no list.

    >>> parse_settings(["privacy.epsilon=0.5,1", "federation.rule=fedavg,fedadam"])[1].values
    ('fedavg', 'fedadam')
    >>> parse_settings(["teacher.hidden=[64,32],[128]"])[0].values
    ([64, 32], [128])
    """
    settings = []
    for text in texts:
        key, sign, listed = text.partition("=")
        if not sign or not listed.strip():
            raise StudyError(f"--set: expected KEY=VALUE,VALUE,…, found {text!r}")
        settings.append(_checked(Setting(key.strip(), _values(listed))))
    return tuple(settings)


def combine(study: Study, settings: Sequence[Setting]) -> tuple[Combination, ...]:
    """Every combination, each a valid study; the first setting varies slowest.

    Raises StudyError naming the combination that makes an impossible study.
    """
    keys = [one.key for one in settings]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise StudyError(f"--set {twice}: expected each key once; give its values with commas")
    total = 1
    for one in settings:
        total *= len(one.values)
    if total > _LARGEST:
        raise StudyError(f"--set: expected at most {_LARGEST:,} combinations, found {total:,}")
    return tuple(
        _combination(study, dict(zip(keys, chosen, strict=True)))
        for chosen in itertools.product(*(one.values for one in settings))
    )


def in_words(settings: Mapping[str, Any]) -> str:
    """One combination as a person writes it.

    >>> in_words({"privacy.epsilon": 0.5, "teacher.hidden": [64, 32]})
    'privacy.epsilon = 0.5, teacher.hidden = [64, 32]'
    """
    return ", ".join(f"{key} = {value_words(value)}" for key, value in settings.items())


def value_words(value: Any) -> str:
    """One value, as short as it is exact."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def known_keys() -> list[str]:
    """Every single value of a study file by its dotted key, lists of sections left out."""
    return sorted(set(_keys(Study, "")))


def _combination(study: Study, settings: Mapping[str, Any]) -> Combination:
    try:
        made = study.revised(**{key.replace(".", "__"): one for key, one in settings.items()})
    except StudyError as error:
        raise StudyError(f"{in_words(settings)}: {error}") from None
    return Combination(_folder_name(settings), settings, made)


def _checked(setting: Setting) -> Setting:
    key, known = setting.key, known_keys()
    if key in _APART:
        raise StudyError(f"--set {key}: {_APART[key]}; leave it out")
    if key not in known:
        # `federation.rounds` means the rounds of another section, not another key of this one.
        namesakes = [one for one in known if one.split(".")[-1] == key.split(".")[-1]]
        close = difflib.get_close_matches(
            key, namesakes or known, n=3 if namesakes else 1, cutoff=0.0
        )
        raise StudyError(
            f"--set {key}: unknown key; did you mean {' or '.join(repr(one) for one in close)}?"
        )
    if len({value_words(one) for one in setting.values}) < len(setting.values):
        raise StudyError(f"--set {key}: expected different values, found one of them twice")
    return setting


def _values(listed: str) -> tuple[Any, ...]:
    try:
        return tuple(tomllib.loads(f"values = [{listed}]")["values"])
    except tomllib.TOMLDecodeError:
        return tuple(_value(part.strip()) for part in listed.split(","))


def _value(word: str) -> Any:
    try:
        return tomllib.loads(f"value = {word}")["value"]
    except tomllib.TOMLDecodeError:
        return word


def _folder_name(settings: Mapping[str, Any]) -> str:
    """A name that can be a folder's; different for different settings."""
    words = {
        key: value_words(value).replace(", ", ",")
        if isinstance(value, list)
        else value_words(value)
        for key, value in settings.items()
    }
    name = ",".join(f"{key}={word}" for key, word in words.items())
    safe = re.sub(r"[^A-Za-z0-9_.,=+\[\]-]", "", name)
    if safe == name and len(safe) <= _LONGEST_NAME:
        return safe
    return f"{safe[:_LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _keys(model: type[Strict], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = _sections(field.annotation)
        for one in inner:
            yield from _keys(one, f"{prefix}{name}.")
        if not inner and not _holds_sections(field.annotation):
            yield prefix + name


def _sections(annotation: Any) -> list[type[Strict]]:
    """The section behind a key, or behind one that may be left out; all of which one is chosen."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return [annotation]
    if typing.get_origin(annotation) in (tuple, list, dict):
        return []
    return [found for one in typing.get_args(annotation) for found in _sections(one)]


def _holds_sections(annotation: Any) -> bool:
    return any(bool(_sections(one)) or _holds_sections(one) for one in typing.get_args(annotation))
