"""What can go wrong, as a tree.

::

    ConsiliumError            every error meant for a person: one line, exit code 2
    ├── StudyError            the study file asks for something unknown or impossible
    ├── DataError             a hospital's data do not fit the dictionary
    ├── PrivacyError          a privacy parameter is unsound, or a budget would be exceeded
    ├── RefusalError          a hospital declines a request; names the rule that decided
    ├── MessageError          a message from the other side is malformed or out of place
    └── RunError              a run folder cannot be created, read or resumed

A wrong call order inside this code base is a `RuntimeError` or `ValueError`: our bug, never shown
as advice to a user.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConsiliumError(Exception):
    """An error whose message says what was expected, what was found and what to do."""


class StudyError(ConsiliumError):
    """The study file is refused."""


class DataError(ConsiliumError):
    """Data do not fit the data dictionary, or cannot be read."""


class PrivacyError(ConsiliumError):
    """A privacy parameter is unsound or a guarantee cannot be given."""


class RefusalError(ConsiliumError):
    """A hospital declines a request."""


class MessageError(ConsiliumError):
    """A message between coordinator and hospital is malformed or out of place."""


class RunError(ConsiliumError):
    """A run folder cannot be created, read or resumed."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """The sentence that names the closest valid choice.

    >>> nearest("epsilom", ["epsilon", "delta"])
    "did you mean 'epsilon'?"
    >>> nearest("zzz", ["epsilon", "delta"])
    'choose one of: delta, epsilon'
    """
    known = sorted(choices)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"choose one of: {', '.join(known)}"
