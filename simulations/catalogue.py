"""Every scenario there is, read from the settings themselves so that the list cannot go stale."""

from __future__ import annotations

import inspect
from typing import Any

from rich.markup import escape
from rich.table import Table

from common.scenario import (
    AttackSpec,
    DropoutsSpec,
    LateSpec,
    MissingColumnsSpec,
    NetworkSpec,
    ObserverSpec,
    ParticipationSpec,
    StragglersSpec,
)
from common.simulation import SimulationSpec
from common.strict import Strict
from simulations.reference import default_words, value_words

_PARTITIONS = {
    "natural sites": (("hospital",), "One data file a hospital, as it is."),
    "equal": (("hospitals",), "Hospitals of equal size."),
    "power_law": (("exponent",), "A few large hospitals and many small ones."),
    "label_skew": (("concentration",), "Each class falls to hospitals in other shares."),
    "covariate_shift": (
        ("column", "concentration"),
        "Each quarter of a column (of age, say), or each of its categories, falls to hospitals in "
        "other shares.",
    ),
    "scaffold": (
        ("hospitals",),
        "Molecules with one scaffold stay together: hospitals share none.",
    ),
    "sites": (("sites",), "As a table of patients and sites says."),
}
_PARTS: dict[str, type[Strict]] = {
    "participation": ParticipationSpec,
    "dropouts": DropoutsSpec,
    "late": LateSpec,
    "network": NetworkSpec,
    "stragglers": StragglersSpec,
    "missing_columns": MissingColumnsSpec,
    "attack": AttackSpec,
    "observer": ObserverSpec,
}


def catalogue() -> dict[str, Any]:
    """Partitions and scenarios: each with its keys, their values and defaults, and its meaning."""
    partitions = {
        name: {
            "section": "[simulation]",
            "meaning": meaning,
            "keys": [_key(SimulationSpec, key) for key in keys],
        }
        for name, (keys, meaning) in _PARTITIONS.items()
    }
    scenarios = {
        name: {
            "section": f"[simulation.scenario.{name}]",
            "meaning": inspect.cleandoc(spec.__doc__ or "").splitlines()[0].replace("``", ""),
            "keys": [_key(spec, key) for key in spec.model_fields],
        }
        for name, spec in _PARTS.items()
    }
    return {"partitions": partitions, "scenarios": scenarios}


def catalogue_tables(found: dict[str, Any]) -> list[Table]:
    """The same for a person."""
    tables = []
    for title, kinds in (
        ("How patients fall to hospitals: partition = … in [simulation]", found["partitions"]),
        ("What may go wrong: sections [simulation.scenario.…]", found["scenarios"]),
    ):
        table = Table(title=escape(title), title_justify="left", show_lines=True)
        table.add_column("kind", no_wrap=True)
        table.add_column("keys (default)")
        table.add_column("meaning")
        for name, kind in kinds.items():
            keys = "\n".join(
                f"{one['key']}: {one['values']} ({one['default']})" for one in kind["keys"]
            )
            table.add_row(name, escape(keys), escape(kind["meaning"]))
        tables.append(table)
    return tables


def _key(spec: type[Strict], name: str) -> dict[str, str]:
    field = spec.model_fields[name]
    values, default = (words(field).replace("`", "") for words in (value_words, default_words))
    return {"key": name, "values": values, "default": default}
