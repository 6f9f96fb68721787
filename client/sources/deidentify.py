"""De-identification, before anything else sees a row.

Direct identifiers cannot be read at all; dates are shifted by an offset of each patient's own,
drawn from the hospital's key; ages over 89 become 90 (HIPAA's Safe Harbor, 45 CFR 164.514(b)(2)).
The patient's identifier itself stays: the ledger and the list of withdrawals know patients by it.
Neither leaves the hospital.
"""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from client.ledger_cohorts import normal_id
from common.derive import to_dates, unread_lines
from common.errors import DataError
from common.readers import Chunk, Source
from common.sources import ColumnMapping
from common.strict import Strict
from common.units import conversion

_AGE_CAP, _OLDEST = 89, 130


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Whole column names, without case and punctuation.
_IDENTIFIERS = _set(
    """
    name fullname firstname lastname middlename givenname familyname surname forename maidenname
    mothersmaidenname patientname initials nextofkin guardian contact employer physician
    physicianname doctor doctorname referringphysician address street streetaddress city town county
    zip zipcode postcode postalcode location latitude longitude birthplace phone phonenumber
    telephone tel mobile fax email mail url website homepage ip ipaddress macaddress ssn
    socialsecuritynumber nhs nhsnumber nationalid passport passportnumber driverslicense licence
    license licencenumber licensenumber insurancenumber insuranceid policynumber beneficiary account
    accountnumber iban mrn medicalrecordnumber recordnumber accessionnumber deviceid deviceserial
    serialnumber vin licenseplate licenceplate fingerprint photo photograph username login
    """
)
# Words that betray an identifier wherever they stand in a column's name.
_WORDS = _set(
    """
    surname firstname lastname maiden address street postcode zipcode phone telephone mobile fax
    email ssn passport iban mrn
    """
)
_CELLS = re.compile(
    r"""\s*(?:
      [^@\s]+@[^@\s]+\.[a-z]{2,}                        # e-mail
    | (?:https?://|www\.)\S+                            # address of a page
    | \d{3}-\d{2}-\d{4}                                 # US social security number
    | \+\d[\d\s()./-]{6,}\d | \(?\d{3}\)?[\s.-]\d{3}[\s.-]\d{4}   # telephone
    | (?:\d{1,3}\.){3}\d{1,3}                           # IPv4
    )\s*""",
    re.VERBOSE | re.IGNORECASE,
)


class DeidentificationRules(Strict):
    """``[deidentify]`` of ``hospital.toml``; it can add to the built-in rules, and name exceptions.

    ``drop``: more columns that must never be read (``*`` stands for anything).
    ``keep``: columns that look like identifiers and are none.
    ``dates``: columns with dates beyond those of ``derive``; ``shift_days``: how far each
    patient's dates are moved at most, back or forth.
    ``ages``: columns with ages in years whose name does not say so.
    """

    drop: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    dates: tuple[str, ...] = ()
    shift_days: Annotated[int, Field(ge=1)] = 365
    ages: tuple[str, ...] = ()

    def forbids(self, column: str) -> bool:
        """Whether the column is a direct identifier."""
        if any(fnmatch.fnmatchcase(column.lower(), one.lower()) for one in self.drop):
            return True
        return column not in self.keep and looks_like_identifier(column)

    def is_age(self, column: str) -> bool:
        """Whether the column holds ages."""
        return column in self.ages or "age" in _words(column)


def looks_like_identifier(column: str) -> bool:
    """Whether a column's name says that it identifies somebody.

    >>> [looks_like_identifier(one) for one in ("Patient_Name", "homePhone", "drug_name", "age")]
    [True, True, False, False]
    """
    words = _words(column)
    return "".join(words) in _IDENTIFIERS or bool(_WORDS & set(words))


class Deidentified:
    """A source without direct identifiers, with each patient's dates shifted.

    ``patient``: the column with patients, or empty when every row is another one.
    ``secret``: called once dates are met; the hospital's own key for shifting them.
    """

    def __init__(
        self,
        source: Source,
        mapping: ColumnMapping,
        rules: DeidentificationRules,
        *,
        patient: str,
        secret: Callable[[], bytes],
    ) -> None:
        self._source, self._mapping, self._rules = source, mapping, rules
        self._owner, self._secret = patient, secret
        self.origin, self.patient, self.columns = source.origin, source.patient, source.columns
        spans = mapping.derive.values()
        self._dates = {*rules.dates, *(one for span in spans for one in (span.start, span.end))}
        self._offsets: dict[str, int] = {}
        self._key = b""
        self._shifted: set[str] = set()
        self._scrubbed: dict[str, int] = {}
        self._unread: dict[str, int] = {}
        self._rows = 0

    def chunks(self, wanted: Sequence[str]) -> Iterator[Chunk]:
        """The source's rows; raises DataError when a direct identifier is asked for."""
        for name in wanted:
            if name != self._owner and self._rules.forbids(name):
                raise DataError(
                    f"{self.origin}: column {name!r} is a direct identifier and is not read; if it "
                    f"is none, write keep = [{name!r}] in [deidentify] of hospital.toml"
                )
        owner = [self._owner] if self._owner else []
        for chunk in self._source.chunks(list(dict.fromkeys([*wanted, *owner]))):
            yield self._clean(chunk, wanted)

    def notes(self) -> tuple[str, ...]:
        """The source's, and the dates that could not be read."""
        return (*self._source.notes(), *unread_lines(self._unread))

    def done(self) -> tuple[str, ...]:
        """What was removed or changed, one line each."""
        never = [name for name in self.columns if name != self._owner and self._rules.forbids(name)]
        lines = []
        if never:
            lines.append(f"never read, as direct identifiers: {', '.join(never)}")
        if self._shifted:
            lines.append(
                f"dates shifted by a secret offset of each patient's own, up to "
                f"{self._rules.shift_days} days: {', '.join(sorted(self._shifted))}"
            )
        lines += [
            f"{name}: {count} cells with a telephone number, e-mail or the like were emptied"
            for name, count in self._scrubbed.items()
        ]
        return tuple(lines)

    def _clean(self, chunk: Chunk, wanted: Sequence[str]) -> Chunk:
        cleaned = {}
        for name in wanted:
            cells = chunk[name]
            if name == self._owner:
                cleaned[name] = cells
            elif name in self._dates or cells.dtype.kind == "M":
                cleaned[name] = self._shift(name, cells, chunk)
            else:
                cleaned[name] = self._scrub(name, cells)
        self._rows += len(next(iter(chunk.values()))) if chunk else 0
        return cleaned

    def _shift(self, name: str, cells: NDArray[Any], chunk: Chunk) -> NDArray[Any]:
        dates, unread = to_dates(cells, self._mapping)
        self._shifted.add(name)
        self._unread[name] = self._unread.get(name, 0) + unread
        offsets = self._offsets_of(chunk, len(cells)).astype("timedelta64[D]")
        return np.asarray(dates + offsets)

    def _offsets_of(self, chunk: Chunk, rows: int) -> NDArray[np.int64]:
        if self._owner:
            # A row of nobody is refused further on.
            names = [
                normal_id(str(cell)) if str(cell).strip() else "" for cell in chunk[self._owner]
            ]
        else:
            names = [f"row-{self._rows + row}" for row in range(rows)]
        return np.array([self._offset(name) for name in names], dtype=np.int64)

    def _offset(self, patient: str) -> int:
        """Days, back or forth, never 0; the same at every reading, known to this hospital alone."""
        known = self._offsets.get(patient)
        if known is None:
            self._key = self._key or self._secret()
            digest = hmac.new(self._key, patient.encode(), hashlib.sha256).digest()
            days = 1 + int.from_bytes(digest[:8], "big") % self._rules.shift_days
            known = self._offsets[patient] = days if digest[8] & 1 else -days
        return known

    def _scrub(self, name: str, cells: NDArray[Any]) -> NDArray[Any]:
        if cells.dtype.kind not in "OSU" or cells.ndim != 1:
            return cells
        different = [one for one in pd.unique(cells.astype(object)) if isinstance(one, str)]
        telling = {one for one in different if _CELLS.fullmatch(one)}
        if not telling:
            return cells
        found = pd.Series(cells, dtype=object)
        is_telling = found.isin(telling)
        self._scrubbed[name] = self._scrubbed.get(name, 0) + int(is_telling.sum())
        return found.mask(is_telling, None).to_numpy(dtype=object)


class AgesCapped:
    """A source whose ages over 89 are 90."""

    def __init__(
        self, source: Source, mapping: ColumnMapping, rules: DeidentificationRules
    ) -> None:
        self._source, self._mapping, self._rules = source, mapping, rules
        self.origin, self.patient, self.columns = source.origin, source.patient, source.columns
        self._capped: dict[str, int] = {}

    def chunks(self, wanted: Sequence[str]) -> Iterator[Chunk]:
        """The source's rows; values that are no human age are left to the dictionary's range."""
        ages = {name: self._per_year(name) for name in wanted if self._rules.is_age(name)}
        for chunk in self._source.chunks(wanted):
            capped = {name: self._cap(name, chunk[name], per) for name, per in ages.items()}
            yield {**chunk, **capped}

    def notes(self) -> tuple[str, ...]:
        """The source's."""
        return self._source.notes()

    def done(self) -> tuple[str, ...]:
        """How many ages were changed."""
        return tuple(
            f"{name}: {count} ages over {_AGE_CAP} read as {_AGE_CAP + 1}"
            for name, count in self._capped.items()
        )

    def _per_year(self, name: str) -> float:
        """How many of the column's units make a year."""
        studied = next((new for new, old in self._mapping.rename.items() if old == name), name)
        unit = self._mapping.units.get(studied)
        return conversion("a", unit).factor if unit else 1.0

    def _cap(self, name: str, cells: NDArray[Any], per_year: float) -> NDArray[Any]:
        if cells.ndim != 1:
            return cells
        text = pd.Series(cells, dtype=object).astype(str).str.replace(",", ".", regex=False)
        years = pd.to_numeric(text, errors="coerce").to_numpy(dtype=float) / per_year
        old = (years > _AGE_CAP) & (years <= _OLDEST)
        if not old.any():
            return cells
        self._capped[name] = self._capped.get(name, 0) + int(old.sum())
        if cells.dtype.kind in "iuf":
            return np.where(old, (_AGE_CAP + 1) * per_year, cells)
        return np.where(old, f"{(_AGE_CAP + 1) * per_year:.15g}", cells.astype(object))


def _words(column: str) -> list[str]:
    parts = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", column)
    return [word.lower() for word in re.split(r"[^A-Za-z0-9]+", parts) if word]
