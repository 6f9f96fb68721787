"""The last step of a run: models, statement and summary on disk."""

from __future__ import annotations

from common.files import write_atomically
from common.study import Study
from common.tensors import save_tensors
from server.conduct import Outcome
from server.statement import privacy_statement, statement_text
from server.store import RunFolder


def finish(study: Study, run: RunFolder, outcome: Outcome) -> None:
    """Write the results of a finished study; ``result.json`` comes last and means done."""
    save_tensors(run.path / "teacher.safetensors", outcome.teacher.state_dict())
    save_tensors(run.path / "student.safetensors", outcome.student.state_dict())
    statement = privacy_statement(study, outcome.facts)
    run.write_json("privacy.json", statement)
    write_atomically(run.path / "PRIVACY.md", statement_text(statement).encode())
    run.write_json(
        "result.json",
        {
            "study": study.name,
            "scaling": outcome.scaling.as_dict(),
            **outcome.facts,
        },
    )
