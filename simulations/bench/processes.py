"""A process and all that it started, as Linux shows them."""

from __future__ import annotations

from pathlib import Path


def peak_mib() -> float:
    """The most memory that this program has held at once.

    Not ``getrusage``'s figure: a child starts with its parent's there.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def family(pid: int) -> list[int]:
    """The process and everything below it, whichever of its threads started it."""
    found = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except OSError:  # it ended
            continue
        found += [one for child in children for one in family(int(child))]
    return found
