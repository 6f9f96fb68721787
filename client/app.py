"""The hospital's Flower app: unpack a message, call one function, pack the answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from client import rounds
from client.aggregation import Aggregator
from client.hospital import Hospital, open_hospital
from common.errors import DataError, RefusalError
from common.flower import pack, unpack
from common.wire import (
    AggregateReply,
    AggregateStep,
    AggregateTask,
    EvaluateTask,
    Hello,
    StatisticsTask,
    TrainTask,
)

OpenHospital = Callable[[Context, str], AbstractContextManager[Hospital]]

_logger = logging.getLogger(__name__)

_REFUSED, _FAILED = 1, 2


def build_client_app(hospital_of: OpenHospital, *, debug: bool = False) -> ClientApp:
    """A ClientApp whose hospital comes from ``hospital_of``: a folder, or memory in simulation.

    It is given the message's context and the digest of the study that the message is about.
    ``debug`` lets errors through as they are; only a simulation may, since they can tell of rows.
    """
    app = ClientApp()

    def serve(kind: type[Any], act: Callable[[Hospital, Any], Any]) -> Callable[..., Message]:
        def handle(message: Message, context: Context) -> Message:
            try:
                task = unpack(kind, message.content)
                with hospital_of(context, task.study_digest) as hospital:
                    reply = act(hospital, task)
            except Exception as error:
                if debug:
                    raise
                _logger.warning("%s: %s", message.metadata.message_type, _logged(error))
                return Message(failure(error), reply_to=message)
            return Message(pack(reply), reply_to=message)

        return handle

    app.query("hello")(serve(Hello, rounds.hello))
    app.query("statistics")(serve(StatisticsTask, rounds.statistics))
    app.train()(serve(TrainTask, rounds.train))
    app.train("aggregate")(serve(AggregateTask, _begin))
    app.query("aggregate")(serve(AggregateStep, _step))
    app.evaluate()(serve(EvaluateTask, rounds.evaluate))
    return app


def _begin(hospital: Hospital, task: AggregateTask) -> AggregateReply:
    return _aggregator(hospital).begin(hospital, task)


def _step(hospital: Hospital, step: AggregateStep) -> AggregateReply:
    return _aggregator(hospital).step(hospital, step)


def _aggregator(hospital: Hospital) -> Aggregator:
    if hospital.aggregator is None:
        raise RefusalError(
            f"{hospital.name} takes part in no secure aggregation: it knows no enrolled peers",
            rule="secagg.enrolled",
        )
    return hospital.aggregator


def _logged(error: Exception) -> str:
    """What this hospital's own log may hold: refusals in full, of other errors only their class.

    A refusal speaks of rules and limits; what else went wrong may quote a cell.
    """
    return str(error) if isinstance(error, RefusalError) else type(error).__name__


def failure(error: Exception) -> Error:
    """What the coordinator may know of a failure: the rule that refused, or that there was one.

    Messages of errors can hold counts, cohort sizes or cells of patients' rows.
    """
    if isinstance(error, RefusalError):
        return Error(code=_REFUSED, reason=f"refused by rule {error.rule or 'request'}")
    return Error(code=_FAILED, reason=f"failed ({type(error).__name__}); see the hospital's log")


def _hospital_from_context(context: Context, digest: str) -> AbstractContextManager[Hospital]:
    """The hospital in this node's own folder.

    ``hospital-folder`` in the node's configuration names it. In Flower's simulation, nodes are
    numbered: ``partition-id`` picks one of ``hospitals/*`` below the run's ``folder``, in order of
    name.
    """
    own = context.node_config.get("hospital-folder")
    if own:
        return open_hospital(Path(str(own)), digest)
    root = Path(str(context.run_config.get("folder", ""))) / "hospitals"
    folders = sorted(path.parent for path in root.glob("*/hospital.toml"))
    number = int(context.node_config.get("partition-id", -1))
    if not 0 <= number < len(folders):
        raise DataError(
            f"node {number}: expected one of {len(folders)} hospital folders below {root}; "
            f"make them with `consilium split`"
        )
    return open_hospital(folders[number], digest)


app = build_client_app(_hospital_from_context)
