"""Units of measurement, as hospitals write them: UCUM (``mm[Hg]``, ``10*3/uL``) or plain words.

A unit is a factor and powers of base dimensions; temperatures also have a zero of their own. What
converts only by knowing the substance (mmol/L of cholesterol to mg/dL) is refused: a factor is
needed, and only the hospital's laboratory can vouch for it.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from common.errors import DataError, nearest

_LENGTH, _MASS, _TIME, _AMOUNT = "length", "mass", "time", "amount"
_DAY = 86_400.0
_YEAR = 365.25 * _DAY

# Unit, in lower case → factor to the SI base, and its dimensions.
_UNITS: dict[str, tuple[float, dict[str, int]]] = {
    "1": (1.0, {}),
    "%": (0.01, {}),
    "m": (1.0, {_LENGTH: 1}),
    "cm": (1e-2, {_LENGTH: 1}),
    "mm": (1e-3, {_LENGTH: 1}),
    "in": (0.0254, {_LENGTH: 1}),
    "ft": (0.3048, {_LENGTH: 1}),
    "kg": (1.0, {_MASS: 1}),
    "g": (1e-3, {_MASS: 1}),
    "mg": (1e-6, {_MASS: 1}),
    "ug": (1e-9, {_MASS: 1}),
    "ng": (1e-12, {_MASS: 1}),
    "pg": (1e-15, {_MASS: 1}),
    "lb": (0.45359237, {_MASS: 1}),
    "oz": (0.028349523125, {_MASS: 1}),
    "l": (1e-3, {_LENGTH: 3}),
    "dl": (1e-4, {_LENGTH: 3}),
    "ml": (1e-6, {_LENGTH: 3}),
    "ul": (1e-9, {_LENGTH: 3}),
    "fl": (1e-18, {_LENGTH: 3}),
    "mol": (1.0, {_AMOUNT: 1}),
    "mmol": (1e-3, {_AMOUNT: 1}),
    "umol": (1e-6, {_AMOUNT: 1}),
    "nmol": (1e-9, {_AMOUNT: 1}),
    "pmol": (1e-12, {_AMOUNT: 1}),
    "s": (1.0, {_TIME: 1}),
    "min": (60.0, {_TIME: 1}),
    "h": (3600.0, {_TIME: 1}),
    "d": (_DAY, {_TIME: 1}),
    "wk": (7 * _DAY, {_TIME: 1}),
    "mo": (_YEAR / 12, {_TIME: 1}),
    "a": (_YEAR, {_TIME: 1}),
    "pa": (1.0, {_MASS: 1, _LENGTH: -1, _TIME: -2}),
    "kpa": (1e3, {_MASS: 1, _LENGTH: -1, _TIME: -2}),
    "mmhg": (133.322387415, {_MASS: 1, _LENGTH: -1, _TIME: -2}),
    "cmh2o": (98.0665, {_MASS: 1, _LENGTH: -1, _TIME: -2}),
    "u": (1.0, {"activity": 1}),
    "mu": (1e-3, {"activity": 1}),
    "iu": (1.0, {"international": 1}),
    "miu": (1e-3, {"international": 1}),
    "eq": (1.0, {"equivalents": 1}),
    "meq": (1e-3, {"equivalents": 1}),
    "k": (1.0, {"temperature": 1}),
    "cel": (1.0, {"temperature": 1}),
    "degf": (5 / 9, {"temperature": 1}),
}
_ZERO_IN_KELVIN = {"k": 0.0, "cel": 273.15, "degf": 459.67 * 5 / 9}
_SPELLINGS = {
    "": "1",
    "mcg": "ug",
    "µg": "ug",
    "μg": "ug",
    "µl": "ul",
    "μl": "ul",
    "µmol": "umol",
    "μmol": "umol",
    "lbs": "lb",
    "lb_av": "lb",
    "oz_av": "oz",
    "in_i": "in",
    "inch": "in",
    "ft_i": "ft",
    "hr": "h",
    "hour": "h",
    "hours": "h",
    "day": "d",
    "days": "d",
    "week": "wk",
    "weeks": "wk",
    "month": "mo",
    "months": "mo",
    "y": "a",
    "yr": "a",
    "year": "a",
    "years": "a",
    "sec": "s",
    "minute": "min",
    "minutes": "min",
    "c": "cel",
    "°c": "cel",
    "degc": "cel",
    "celsius": "cel",
    "f": "degf",
    "°f": "degf",
    "fahrenheit": "degf",
    "percent": "%",
    "bpm": "1/min",
    "mm_hg": "mmhg",
}
_TERM = re.compile(r"^(?P<name>[^\d^*]+?[^\d^*]*|cmh2o)(?:\^?(?P<power>[23]))?$")
_POWER_OF_TEN = re.compile(r"^(?:1?x)?10[*^](?P<power>\d+)$")


@dataclass(frozen=True)
class Conversion:
    """``wanted = found · factor + offset``."""

    factor: float
    offset: float = 0.0

    @property
    def changes(self) -> bool:
        """Whether anything is to be done at all."""
        return (self.factor, self.offset) != (1.0, 0.0)


def conversion(found: str, wanted: str) -> Conversion:
    """How a value in the unit ``found`` becomes one in ``wanted``; raises DataError in one line.

    >>> conversion("g/L", "mg/dL").factor
    100.0
    >>> round(98.6 * conversion("degF", "Cel").factor + conversion("degF", "Cel").offset, 6)
    37.0
    """
    if _spelt(found) == _spelt(wanted):
        return Conversion(1.0)
    factor, powers = _parse(found)
    factor_wanted, powers_wanted = _parse(wanted)
    if powers != powers_wanted:
        raise DataError(
            f"unit {found!r} is not convertible to {wanted!r} without knowing the substance; "
            f"give a factor for it"
        )
    # To twelve digits: 10 and not 9.999999999999998.
    ratio = float(f"{factor / factor_wanted:.12g}")
    zero, zero_wanted = (_ZERO_IN_KELVIN.get(_spelt(unit)) for unit in (found, wanted))
    if zero is None or zero_wanted is None:
        return Conversion(ratio)
    return Conversion(ratio, float(f"{(zero - zero_wanted) / factor_wanted:.12g}"))


def _spelt(unit: str) -> str:
    text = re.sub(r"\{[^}]*\}", "", unit.strip().lower())
    text = text.replace("[", "").replace("]", "").replace(" ", "")
    return _SPELLINGS.get(text, text)


def _parse(unit: str) -> tuple[float, Counter[str]]:
    factor, powers = 1.0, Counter[str]()
    for position, part in enumerate(_spelt(unit).split("/")):
        sign = -1 if position else 1
        scale, dimensions = _term(part, unit)
        factor *= scale**sign
        for name, power in dimensions.items():
            powers[name] += sign * power
    return factor, Counter({name: power for name, power in powers.items() if power})


def _term(part: str, unit: str) -> tuple[float, dict[str, int]]:
    part = _SPELLINGS.get(part, part)
    if part in _UNITS:
        return _UNITS[part]
    if ten := _POWER_OF_TEN.match(part):
        return 10.0 ** int(ten["power"]), {}
    term = _TERM.match(part)
    name = _SPELLINGS.get(term["name"], term["name"]) if term else ""
    if term is None or name not in _UNITS:
        raise DataError(f"unit {unit!r}: {part!r} is not known here; {nearest(part, _UNITS)}")
    power = int(term["power"] or 1)
    scale, dimensions = _UNITS[name]
    return scale**power, {dimension: power * count for dimension, count in dimensions.items()}
