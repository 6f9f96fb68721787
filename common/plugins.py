"""Tasks and models that others wrote, found by name. No code ever travels with a study.

In a deployment every party installs such code itself, as a package that offers it under an entry
point; a study only names it. In a simulation, whose study file and machine are the researcher's
own, ``module:object`` beside the study file serves as well.
"""

from __future__ import annotations

import importlib
import os
import sys
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

TASKS_GROUP = "consilium.tasks"
MODELS_GROUP = "consilium.models"
OWN_CODE = "CONSILIUM_OWN_CODE"
"""Names the folder whose modules a simulation may load; worker processes inherit it."""


def allow_code_in(folder: Path) -> None:
    """Let ``module:object`` name code in ``folder``, or what this process could import anyway."""
    os.environ[OWN_CODE] = str(folder.resolve())


def installed(group: str) -> list[str]:
    """The names under which installed packages offer something in ``group``."""
    return sorted(_offered(group))


def found(group: str, name: str, kind: type[Any]) -> Any:
    """What ``name`` stands for, an entry point of ``group`` or ``module:object``; a ``kind``.

    Raises ValueError, in one line, when it cannot be had or may not be.
    """
    thing = _own(group, name) if ":" in name else _installed(group, name)
    if not isinstance(thing, kind):
        raise ValueError(
            f"{name!r}: expected {kind.__module__}.{kind.__qualname__}, "
            f"found {type(thing).__qualname__}; see docs/own-task.md"
        )
    return thing


@lru_cache
def _offered(group: str) -> dict[str, EntryPoint]:
    return {one.name: one for one in entry_points(group=group)}


@lru_cache
def _installed(group: str, name: str) -> Any:
    if name not in _offered(group):
        raise ValueError(f"{name!r}: no installed package offers it under {group!r}")
    try:
        return _offered(group)[name].load()
    except Exception as error:  # somebody else's code may raise anything
        raise ValueError(f"{name!r}: {_said(error)}") from None


def _own(group: str, name: str) -> Any:
    folder = os.environ.get(OWN_CODE)
    if not folder:
        raise ValueError(
            f"{name!r}: code beside a study runs in simulations only; install it as a package "
            f"that offers it under the entry point {group!r}, and name that"
        )
    if folder not in sys.path:
        sys.path.append(folder)  # last: nothing beside a study takes an installed module's place
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # somebody else's code may raise anything
        raise ValueError(f"{name!r} in {folder}: {_said(error)}") from None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
