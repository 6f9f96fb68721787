"""Whose presence is hidden, and what "neighbouring" means. Both are types, never comments."""

from __future__ import annotations

from enum import StrEnum


class PrivacyUnit(StrEnum):
    """The thing whose whole contribution is clipped once and hidden by the noise."""

    PATIENT = "patient"
    RECORD = "record"


class Relation(StrEnum):
    """The neighbouring relation of the guarantee.

    ``ADD_REMOVE``: data sets differ by one unit's presence; a sum of clipped contributions moves
    by at most ``clip_norm``. ``REPLACE_ONE``: one unit is exchanged for another; the sum moves by
    at most ``2 * clip_norm``.
    """

    ADD_REMOVE = "add_or_remove_one"
    REPLACE_ONE = "replace_one"


class Trust(StrEnum):
    """Against whom the guarantee holds.

    ``LOCAL``: each hospital's release is private by itself, whoever sees it.
    ``DISTRIBUTED``: only the hospitals' noised sum exists anywhere; it is private against the
    coordinator together with the tolerated colluders.
    ``NONE``: no guarantee; simulation on public data only.
    """

    LOCAL = "local"
    DISTRIBUTED = "distributed"
    NONE = "none"
