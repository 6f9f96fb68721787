"""What a long-running program did: one JSON object a line, in files that rotate.

Each line has ``time``, ``level``, ``event`` and the facts given with it, which are plain values:
names of studies, rules, services, counts of rounds; never patient data. Of an exception only its
class is written. Records of other libraries become an ``event`` of their own message, so only
loggers whose messages are known belong under such a handler.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

Plain = str | int | float | bool | None

_LARGEST_FILE = 8 * 2**20
_KEPT = 5
_LONGEST_TEXT = 500


class JsonLog:
    """A log of events in ``path``; files are of mode 0600, the newest ``_KEPT`` are kept."""

    def __init__(self, path: Path) -> None:
        """Makes the folder where it is missing."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._handler = _PrivateFiles(path, maxBytes=_LARGEST_FILE, backupCount=_KEPT)
        self._handler.setFormatter(_OneLine())
        # A logger of its own, outside the tree: nothing else writes here, and nothing is passed on.
        self._logger = logging.Logger(str(path), logging.INFO)
        self._logger.addHandler(self._handler)

    def event(self, event: str, /, **facts: Plain) -> None:
        """Write one line; texts are cut at 500 characters."""
        self._logger.info("%s", event, extra={"facts": facts})

    def warning(self, event: str, /, **facts: Plain) -> None:
        """The same, as something that somebody should look at."""
        self._logger.warning("%s", event, extra={"facts": facts})

    def take_in(self, logger: logging.Logger) -> None:
        """Let what ``logger`` writes end up here too."""
        logger.addHandler(self._handler)

    def close(self) -> None:
        """Close the file."""
        self._handler.close()


def one_line_formatter() -> logging.Formatter:
    """For programs that write the same lines to another place."""
    return _OneLine()


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": _shown(record.getMessage()),
        }
        for name, fact in getattr(record, "facts", {}).items():
            line.setdefault(name, _shown(fact) if isinstance(fact, str) else fact)
        if record.exc_info and record.exc_info[0]:
            # Its text, and its frames' values, may quote a patient's record.
            line["error"] = record.exc_info[0].__name__
        return json.dumps(line, ensure_ascii=False, default=lambda value: type(value).__name__)


class _PrivateFiles(RotatingFileHandler):
    def _open(self) -> TextIOWrapper:
        def private(path: str, flags: int) -> int:
            return os.open(path, flags, 0o600)

        return open(self.baseFilename, "a", encoding="utf-8", opener=private)


def _shown(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + "…"
