"""What was left out while reading, and why: counted by reason, with a few names."""

from __future__ import annotations

from dataclasses import dataclass, field

_NAMES = 3


@dataclass
class Skipped:
    """``things``: what is counted, in the plural."""

    things: str
    _found: dict[str, list[str]] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str, name: str = "") -> None:
        """One more for ``reason``, which says what to do; ``name`` is a file at the hospital."""
        self._counts[reason] = self._counts.get(reason, 0) + 1
        names = self._found.setdefault(reason, [])
        if name and len(names) < _NAMES:
            names.append(name)

    def lines(self) -> tuple[str, ...]:
        """One line a reason, the most frequent first."""
        found = []
        for reason, count in sorted(self._counts.items(), key=lambda one: (-one[1], one[0])):
            names = self._found[reason]
            more = ", …" if len(names) < count else ""
            listed = f" ({', '.join(names)}{more})" if names else ""
            found.append(f"{count} {self.things} left out: {reason}{listed}")
        return tuple(found)
