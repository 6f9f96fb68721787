"""`consilium hospital check`: is everything in order here, and if not, what is to be done?"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from client.approvals import approved_study, decision_of, study_folders
from client.hospitalfile import HospitalFile, load_hospital_file
from client.link import Coordinator, connect
from client.linkfolder import LinkFolder, days_left, mutual_context
from client.running import PAUSED
from client.safe import Safe, open_safe
from client.visits import LARGEST_OFFSET_S, Dial
from common.auditlog import utc_now, verify_log
from common.checkpoint import Checkpoint, verify_log_against
from common.errors import ConsiliumError, DataError, LinkError, SecretError
from common.secretfiles import WrappingKey, check_private

TOLERATED_OFFSET_S = 60.0
_LEAST_DISK = 2**30
_SHORTEST_LIFE_DAYS = 7.0
_SECRET_FILES = ("identity", "ledger.secret", "noise.secret", "ledger.db", "audit.log")

# Without these the hospital's programs are not started; the rest may mend itself meanwhile.
ESSENTIAL = ("settings", "keys", "policy", "ledger", "link")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line: what was looked at, whether it is in order, and what was found or is to be done."""

    name: str
    is_well: bool
    text: str

    @property
    def line(self) -> str:
        """For a person."""
        return f"{'✓' if self.is_well else '✗'} {self.name:<11} {self.text}"


@dataclass
class Examination:
    """Looks at one hospital's folder; nothing is changed there but the ledger's own upkeep."""

    folder: Path
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    dial: Dial = connect
    clock: Callable[[], datetime] = utc_now
    _safe: Safe | None = None
    _coordinator: Coordinator | None = None

    def findings(self, names: tuple[str, ...] | None = None) -> list[Finding]:
        """All findings, or those of these names, in a fixed order."""
        parts: dict[str, Callable[[ExitStack], str]] = {
            "versions": lambda _: _versions(),
            "disk": lambda _: self._disk(),
            "settings": lambda _: self._settings_text(),
            "noise": lambda _: self._noise(),
            "keys": lambda _: self._keys(),
            "ledger": self._open,
            "policy": lambda _: self._policy(),
            "studies": lambda _: self._studies(),
            "data": lambda _: self._data(),
            "link": lambda _: self._link(),
            "certificate": lambda _: self._certificate(),
            "connection": self._connect,
            "clock": lambda _: self._clock_text(),
        }
        found = []
        with ExitStack() as stack:
            for name, look in parts.items():
                if names is not None and name not in names:
                    continue
                try:
                    found.append(Finding(name=name, is_well=True, text=look(stack)))
                except ConsiliumError as error:
                    found.append(Finding(name=name, is_well=False, text=str(error)))
            self._safe = self._coordinator = None
        return found

    def _settings(self) -> HospitalFile:
        return load_hospital_file(self.folder)

    def _settings_text(self) -> str:
        settings = self._settings()
        if settings.safe != ".":
            raise DataError(
                f"hospital.toml: expected safe = '.' in the folder of `consilium hospital init`, "
                f"found {settings.safe!r}"
            )
        paused = "; paused" if (self.folder / PAUSED).exists() else ""
        return f"{settings.name}, {settings.declared_patients} patients declared{paused}"

    def _noise(self) -> str:
        if self._settings().test_noise_seed is not None:
            raise DataError(
                "TEST NOISE: hospital.toml sets test_noise_seed, so NOBODY IS PROTECTED; remove it "
                "before any patient's data are used"
            )
        return "secret, from this hospital's own key"

    def _keys(self) -> str:
        if self.folder.stat().st_mode & 0o077:
            raise SecretError(f"{self.folder}: others can look into it; run `chmod 700`")
        for name in _SECRET_FILES:
            check_private(self.folder / name)
        WrappingKey.of_folder(self.folder, self.environ)
        beside = (self.folder / "key").exists()
        advice = " (the key lies beside the secrets; better keep it elsewhere)" if beside else ""
        return f"open, and nobody else's{advice}"

    def _open(self, stack: ExitStack) -> str:
        self._safe = safe = stack.enter_context(open_safe(self.folder, self.environ))
        kept = LinkFolder(self.folder)
        if kept.checkpoint.exists() and kept.is_joined:
            heads = verify_log_against(
                safe.folder.audit_log,
                Checkpoint.load(kept.checkpoint),
                hospital=safe.identity.public,
                coordinator=kept.facts().identity,
            )
            scope = "complete up to the coordinator's checkpoint"
        else:
            heads = verify_log(safe.folder.audit_log, safe.identity.public)
            scope = "no checkpoint of the coordinator's yet"
        return f"agrees with the audit log, {len(heads)} records verified; {scope}"

    def _policy(self) -> str:
        policy = self._needed_safe().policy()
        budget = policy.budget
        return (
            f"signed, in force: ε {budget.epsilon_lifetime:g} a patient, "
            f"{budget.epsilon_per_year:g} a year"
        )

    def _studies(self) -> str:
        safe = self._needed_safe()
        decisions = [
            decision_of(place, safe.identity.public, safe.log)
            for place in study_folders(self.folder)
        ]
        if "unsound" in decisions:
            raise SecretError(
                "a study's answer is not the one that was signed last; see `consilium hospital "
                "studies` and decide again"
            )
        if not decisions:
            return "none was offered yet"
        counts = {one: decisions.count(one) for one in ("approved", "refused", "open")}
        return ", ".join(f"{count} {one}" for one, count in counts.items() if count)

    def _data(self) -> str:
        from client.hospital import own_records  # noqa: PLC0415 (torch: the daemon does without)

        safe, settings = self._needed_safe(), self._settings()
        lines = []
        for place in study_folders(self.folder):
            if decision_of(place, safe.identity.public, safe.log) != "approved":
                continue
            study, _ = approved_study(self.folder, place.digest, safe.identity, safe.log)
            table = own_records(settings, study, self.folder, safe.dates_key)
            missing = sum(column.missing for column in table.report.columns)
            odd = sum(one.out_of_range + one.unmapped for one in table.report.columns)
            lines.append(
                f"{study.name}: {table.report.rows} rows, {missing} cells missing, {odd} odd"
            )
        return "; ".join(lines) or "not looked at: no study is approved"

    def _link(self) -> str:
        link, settings = LinkFolder(self.folder), self._settings()
        facts = link.facts()
        if facts.name != settings.name:
            raise LinkError(
                f"hospital.toml: expected name = {facts.name!r}, as the coordinator enrolled this "
                f"hospital, found {settings.name!r}"
            )
        link.settle()
        mutual_context(link, WrappingKey.of_folder(self.folder, self.environ))
        if days_left(link.read_certificate(), self.clock()) < 0:
            raise LinkError(
                "this hospital's certificate has expired; ask the coordinator for a new code and "
                "join again"
            )
        return f"{facts.name} at {facts.address}"

    def _certificate(self) -> str:
        left = days_left(LinkFolder(self.folder).read_certificate(), self.clock())
        if left < _SHORTEST_LIFE_DAYS:
            raise LinkError(
                f"expires in {left:.1f} days, and should have been renewed: start the daemon, see "
                f"its log, or join again with a new code"
            )
        return f"good for {left:.0f} more days"

    def _connect(self, stack: ExitStack) -> str:
        wrapping = WrappingKey.of_folder(self.folder, self.environ)
        self._coordinator = stack.enter_context(self.dial(self.folder, wrapping))
        offered = self._coordinator.studies()
        return f"the coordinator answers over mutual TLS and offers {len(offered)} studies"

    def _clock_text(self) -> str:
        if self._coordinator is None:
            raise LinkError("could not be compared: no connection to the coordinator")
        offset = self._coordinator.clock_offset_s()
        if abs(offset) > TOLERATED_OFFSET_S:
            way = "ahead of" if offset > 0 else "behind"
            raise LinkError(
                f"{abs(offset):.0f} s {way} the coordinator's: expected at most "
                f"{TOLERATED_OFFSET_S:.0f} s (beyond {LARGEST_OFFSET_S:.0f} s nothing runs); "
                f"switch on time synchronisation (`timedatectl set-ntp true`)"
            )
        return f"within {max(1.0, abs(offset)):.0f} s of the coordinator's"

    def _disk(self) -> str:
        free = shutil.disk_usage(self.folder).free
        if free < _LEAST_DISK:
            raise DataError(
                f"{self.folder}: expected 1 GiB of free space, found {free / 2**30:.2f}; the "
                f"ledger and the log must be able to grow"
            )
        return f"{free / 2**30:.0f} GiB free"

    def _needed_safe(self) -> Safe:
        if self._safe is None:
            raise SecretError("could not be looked at: the safe does not open")
        return self._safe


def _versions() -> str:
    parts = ", ".join(f"{name} {version(name)}" for name in ("flwr", "torch", "cryptography"))
    return f"consilium {version('consilium')}, {parts}, Python {sys.version.split()[0]}"
