"""One JSON object a line; nothing of an error but its class."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from common import jsonlog
from common.jsonlog import JsonLog


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_events_are_lines_of_json_nobody_else_can_read(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "daemon.log"
    log = JsonLog(path)
    log.event("started", pid=7, note="first\nsecond ε", long="x" * 900, none=None)
    log.warning("odd", event="kept", level="kept")
    log.close()
    first, second = lines(path)
    assert first["event"] == "started"
    assert (first["pid"], first["note"], first["none"]) == (7, "first\nsecond ε", None)
    assert len(str(first["long"])) == 501
    assert str(first["time"]).endswith("+00:00")
    assert (second["event"], second["level"]) == ("odd", "warning")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_an_exceptions_words_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "daemon.log"
    log = JsonLog(path)
    logger = logging.Logger("some library")
    log.take_in(logger)
    try:
        raise ValueError("CANARY cell")
    except ValueError:
        logger.exception("it failed")
    log.close()
    (line,) = lines(path)
    assert (line["event"], line["error"]) == ("it failed", "ValueError")
    assert "CANARY" not in path.read_text()


def test_files_rotate_and_stay_private(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(jsonlog, "_LARGEST_FILE", 1000)
    log = JsonLog(tmp_path / "daemon.log")
    for number in range(100):
        log.event("tick", number=number)
    log.close()
    files = sorted(tmp_path.iterdir())
    assert 2 <= len(files) <= 6
    assert all(one.stat().st_mode & 0o077 == 0 for one in files)
    assert lines(tmp_path / "daemon.log")[-1]["number"] == 99
