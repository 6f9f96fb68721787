"""What can go wrong, as a tree.

::

    ConsiliumError            every error meant for a person: one line, exit code 2
    ├── StudyError            the study file asks for something unknown or impossible
    ├── DataError             a hospital's data do not fit the dictionary
    ├── PrivacyError          a privacy parameter is unsound, or a budget would be exceeded
    ├── RefusalError          a hospital declines a request; names the rule that decided
    ├── PolicyError           a hospital's policy file is missing, unsigned or says the impossible
    ├── LedgerError           the budget ledger is damaged, rolled back, or cannot be written
    ├── AuditError            the audit log was edited, cut or reordered, or cannot be written
    ├── SecretError           a key or secret file cannot be opened, or anyone could read it
    ├── SignatureError        a signature is not by the expected key over these bytes
    ├── SecAggError           a secure aggregation cannot be completed, or its terms are unsound
    ├── LinkError             the other side cannot be reached, or is not who it should be
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
    """A hospital declines a request.

    ``rule`` names what decided, such as ``budget.epsilon_lifetime``. The message may hold facts
    that stay at the hospital (a cohort's size): only the rule's name is for the coordinator.
    """

    def __init__(self, message: str, *, rule: str = "") -> None:
        """``message``: rule, what was found, the limit, what to do."""
        super().__init__(message)
        self.rule = rule


class PolicyError(ConsiliumError):
    """A hospital's policy file cannot be relied on."""


class LedgerError(ConsiliumError):
    """The budget ledger cannot be relied on, or cannot be written."""


class AuditError(ConsiliumError):
    """The audit log cannot be relied on, or cannot be written."""


class SecretError(ConsiliumError):
    """A key or secret file cannot be opened, or is not secret."""


class SignatureError(ConsiliumError):
    """A signature does not verify."""


class SecAggError(ConsiliumError):
    """A secure aggregation cannot be completed, or its terms are unsound."""


class MessageError(ConsiliumError):
    """A message between coordinator and hospital is malformed or out of place."""


class LinkError(ConsiliumError):
    """Coordinator and hospital cannot speak: no connection, certificate or common time."""


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
