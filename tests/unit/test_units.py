"""Units: known conversions, and refusals where only the laboratory can know."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from common.units import _UNITS, conversion


@pytest.mark.parametrize(
    ("found", "wanted", "value", "expected"),
    [
        ("mg/dL", "g/L", 150.0, 1.5),
        ("[lb_av]", "kg", 100.0, 45.359237),
        ("in", "cm", 70.0, 177.8),
        ("degF", "Cel", 212.0, 100.0),
        ("°C", "K", 20.0, 293.15),
        ("kPa", "mm[Hg]", 16.0, 120.009869),
        ("10*3/uL", "10*9/L", 7.2, 7.2),
        ("10^3/µl", "/L", 7.2, 7.2e9),
        ("kg/m2", "g/cm2", 25.0, 2.5),
        ("µmol/L", "mmol/l", 88.0, 0.088),
        ("years", "mo", 2.0, 24.0),
        ("{score}", "1", 7.0, 7.0),
        ("%", "1", 45.0, 0.45),
        ("mmHg", "mm[Hg]", 120.0, 120.0),
    ],
)
def test_known_conversions(found: str, wanted: str, value: float, expected: float) -> None:
    one = conversion(found, wanted)
    assert value * one.factor + one.offset == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("pair", [("mmol/L", "mg/dL"), ("kg", "cm"), ("IU/L", "U/L"), ("mg", "")])
def test_what_needs_the_substance_is_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(DataError, match="give a factor"):
        conversion(*pair)


def test_an_unknown_unit_names_the_nearest() -> None:
    with pytest.raises(DataError, match="'mgg' is not known here; did you mean 'mg'"):
        conversion("mgg/dL", "mg/dL")


@given(st.sampled_from(sorted(_UNITS)), st.sampled_from(sorted(_UNITS)), st.floats(-1e6, 1e6))
def test_there_and_back_is_the_same(found: str, wanted: str, value: float) -> None:
    try:
        there, back = conversion(found, wanted), conversion(wanted, found)
    except DataError:
        return
    passed = (value * there.factor + there.offset) * back.factor + back.offset
    assert passed == pytest.approx(value, rel=1e-9, abs=1e-6)
