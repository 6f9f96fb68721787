"""What the coordinator's service needs of Flower: nodes and runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from common.errors import RunError
from common.flower_tasks import Control, Endpoint, RunState
from server.desk import UnavailableError
from server.runner import STUDY_SETTING


class Federation(Protocol):
    """Flower's SuperLink as seen from here. All methods raise UnavailableError when it is away."""

    def register_node(self, public_key_pem: str, name: str) -> int:
        """Let the node with this key in; its id, the same when repeated."""

    def unregister_node(self, node_id: int) -> None:
        """Shut a node out; one that is not known is left alone."""

    def nodes(self) -> Mapping[int, bool]:
        """All registered nodes, and whether each is online."""

    def start_run(self, study_id: str) -> int:
        """Start an attempt at a study; the run's id."""

    def stop_run(self, run_id: int) -> None:
        """Stop a run; one that has ended is left alone."""

    def run_status(self, run_id: int) -> RunState:
        """How a run stands."""


class FlowerFederation:
    """The SuperLink on this machine. It is dialled anew each time: its certificate changes."""

    def __init__(self, address: str, ca: Path) -> None:
        """``address``: host:port; ``ca``: the file that verifies it."""
        self._address = address
        self._ca = ca

    def register_node(self, public_key_pem: str, name: str) -> int:
        """See ``Federation``."""
        with self._control() as control:
            return control.register_node(public_key_pem.encode(), name)

    def unregister_node(self, node_id: int) -> None:
        """See ``Federation``."""
        with self._control() as control:
            control.unregister_node(node_id)

    def nodes(self) -> Mapping[int, bool]:
        """See ``Federation``."""
        with self._control() as control:
            return {one.node_id: one.is_online for one in control.nodes()}

    def start_run(self, study_id: str) -> int:
        """See ``Federation``."""
        with self._control() as control:
            return control.start_run({STUDY_SETTING: study_id})

    def stop_run(self, run_id: int) -> None:
        """See ``Federation``."""
        with self._control() as control:
            control.stop_run(run_id)

    def run_status(self, run_id: int) -> RunState:
        """See ``Federation``."""
        with self._control() as control:
            return control.run_state(run_id)

    @contextmanager
    def _control(self) -> Iterator[Control]:
        try:
            control = Control(Endpoint(self._address, self._ca.read_bytes()))
        except OSError as error:
            raise UnavailableError(f"{self._ca}: cannot be read ({error.strerror})") from None
        try:
            yield control
        except RunError as error:
            raise UnavailableError(str(error)) from None
        finally:
            control.close()
