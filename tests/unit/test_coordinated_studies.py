"""A study's states: offered, answered, begun, tried again, ended; coordinators that crash."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from common.errors import RefusalError, RunError, SignatureError, StudyError
from common.study import parse_study
from server.desk import NotFoundError, UnavailableError
from server.registry import StudyRow
from server.store import RunFolder
from tests.unit.coordinator import FakeClock, FakeFederation, FakeHospital, World, world_at


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with world_at(tmp_path / "desk", FakeClock()) as world:
        yield world


@pytest.fixture
def text(tree: dict[str, Any]) -> str:
    return tomli_w.dumps(tree)


def distributed(tree: dict[str, Any], hospitals: int) -> str:
    tree["privacy"]["trust"] = "distributed"
    tree["federation"] = {"hospitals": hospitals, "minimum_hospitals": 2, "tolerated_colluders": 1}
    return tomli_w.dumps(tree)


def running(world: World, text: str) -> tuple[StudyRow, tuple[FakeHospital, FakeHospital]]:
    """A study of two hospitals whose first attempt has begun."""
    both = world.join("north"), world.join("south")
    row = world.service.studies.submit(text, None, actor="local")
    world.agree(*both)
    tick(world, 2)
    return world.service.studies.find(row.id), both


def tick(world: World, times: int = 1) -> None:
    for _ in range(times):
        world.service.driver.tick()


def folder(world: World, row: StudyRow) -> RunFolder:
    return world.service.studies.folder(row)


def end(world: World, row: StudyRow, *, message: str = "", is_passing: bool = True) -> None:
    """The attempt ends as ``server.runner`` would leave it."""
    run = world.service.studies.find(row.id).run_id
    assert run is not None
    world.federation.runs[run] = "failed"
    if message:
        folder(world, row).write_json(
            "failure.json", {"message": message, "is_passing": is_passing}
        )


def finish(world: World, row: StudyRow) -> None:
    folder(world, row).write_json("result.json", {"hospitals": ["north", "south"]})
    folder(world, row).write_json("privacy.json", {"guaranteed": True})


def test_a_study_begins_when_all_have_answered_and_ends_with_its_result(
    world: World, text: str
) -> None:
    both = world.join("north"), world.join("south")
    row = world.service.studies.submit(text, None, actor="local")
    assert (row.state, row.id) == ("offered", f"small-{row.digest[:12]}")
    world.agree(both[0])
    tick(world)
    assert world.federation.started == []  # one has not answered
    world.agree(both[1])
    tick(world, 2)
    assert world.federation.started == [row.id]
    job = json.loads((folder(world, row).path / "job.json").read_text())
    nodes = {one.node_id: one.name for one in world.service.desk.registry.hospitals()}
    assert job["hospitals"] == {str(node): name for node, name in nodes.items()}
    tick(world, 3)
    assert world.federation.started == [row.id]
    finish(world, row)
    tick(world)
    assert world.service.studies.find(row.id).state == "finished"


def test_offers_are_signed_and_only_for_the_invited(world: World, text: str) -> None:
    north, south = world.join("north"), world.join("south")
    world.join("west")
    world.service.studies.submit(text, ["north", "south"], actor="local")
    (offered,) = world.service.studies.offered_to("north")
    offered.offer.verify(world.service.desk.identity.public)
    assert offered.offer.hospitals == {
        "north": north.identity.public.text(),
        "south": south.identity.public.text(),
    }
    assert world.service.studies.offered_to("west") == []


def test_answers_count_only_from_the_hospital_itself_and_until_the_study_begins(
    world: World, text: str
) -> None:
    north, south = world.join("north"), world.join("south")
    studies, active = world.service.studies, world.service.admission.active
    row = studies.submit(text, None, actor="local")
    (offered,) = studies.offered_to("north")
    with pytest.raises(SignatureError):
        studies.answer(active("north"), south.answer(offered))
    with pytest.raises(SignatureError):
        studies.answer(
            active("north"), north.answer(offered).model_copy(update={"decision": "refuse"})
        )
    south.name = "north"
    with pytest.raises(RefusalError, match="expected one of south"):
        studies.answer(active("south"), south.answer(offered))
    south.name = "south"
    world.agree(north, decision="refuse")
    assert studies.standing(row).refused == ("north",)
    world.agree(north)  # it may change its mind
    assert studies.standing(row).approved == ("north",)
    world.agree(south)
    tick(world)
    studies.answer(active("north"), north.answer(offered))  # a repetition is no news
    with pytest.raises(RunError, match="before it began"):
        studies.answer(active("north"), north.answer(offered, "refuse"))


def test_too_few_approvals_begin_nothing(world: World, text: str) -> None:
    both = world.join("north"), world.join("south")
    row = world.service.studies.submit(text, None, actor="local")
    world.agree(both[0])
    with pytest.raises(RunError, match="at least 2 approvals, found 1"):
        world.service.studies.begin(row.id, actor="local")
    world.agree(both[1], decision="refuse")
    tick(world, 2)
    found = world.service.studies.find(row.id)
    assert found.state == "offered"
    assert "all have answered: expected at least 2" in found.last_error


def test_an_operator_begins_without_those_who_do_not_answer(world: World, text: str) -> None:
    hospitals = [world.join(name) for name in ("north", "south", "west")]
    row = world.service.studies.submit(text, None, actor="local")
    world.agree(*hospitals[:2])
    tick(world)
    assert world.federation.started == []
    world.service.studies.begin(row.id, actor="anna")
    tick(world)
    job = json.loads((folder(world, row).path / "job.json").read_text())
    assert sorted(job["hospitals"].values()) == ["north", "south"]


def test_a_secure_sum_needs_exactly_its_number_of_hospitals(
    world: World, tree: dict[str, Any]
) -> None:
    hospitals = [world.join(f"h{number}") for number in range(4)]
    text = distributed(tree, 4)
    with pytest.raises(RunError, match="at least 4 hospitals to invite"):
        world.service.studies.submit(text, ["h0", "h1"], actor="local")
    row = world.service.studies.submit(text, None, actor="local")
    world.agree(*hospitals[:3])
    with pytest.raises(RunError, match="exactly federation.hospitals = 4"):
        world.service.studies.begin(row.id, actor="local")
    world.agree(hospitals[3])
    tick(world, 2)
    assert world.federation.started == [row.id]


def test_unsound_submissions_are_refused(world: World, text: str, tree: dict[str, Any]) -> None:
    submit = world.service.studies.submit
    with pytest.raises(RunError, match="to invite, found 0"):
        submit(text, None, actor="local")
    world.join("north")
    world.join("south")
    with pytest.raises(StudyError, match="not valid TOML"):
        submit("= nonsense", None, actor="local")
    with pytest.raises(RunError, match="expected enrolled ones"):
        submit(text, ["north", "nowhere"], actor="local")
    tree["public"] = {"kind": "held_apart"}
    with pytest.raises(StudyError, match="simulations"):
        submit(tomli_w.dumps(tree), None, actor="local")
    tree["public"] = {"kind": "file", "source": {"kind": "csv", "path": "corpus.csv"}}
    with pytest.raises(RunError, match="public corpus"):
        submit(tomli_w.dumps(tree), None, actor="local")
    submit(text, None, actor="local")
    with pytest.raises(RunError, match="submitted already"):
        submit(text, None, actor="local")
    assert len(world.service.studies.offered_to("north")) == 1


def test_a_failed_attempt_is_repeated_after_waits_that_double(world: World, text: str) -> None:
    row, _ = running(world, text)
    waits = []
    for attempt in range(1, 9):
        end(world, row, message="too few hospitals came")
        tick(world)
        found = world.service.studies.find(row.id)
        assert (found.state, found.attempts) == ("running", attempt)
        assert found.next_attempt_at is not None
        wait = found.next_attempt_at - world.clock()
        waits.append(wait.total_seconds())
        tick(world)
        assert len(world.federation.started) == attempt
        world.clock.now += wait
        tick(world)
        assert len(world.federation.started) == attempt + 1
    assert waits == [5, 10, 20, 40, 80, 160, 320, 640]
    assert found.last_error == "too few hospitals came"
    # A finished round starts the waits anew.
    folder(world, row).log({"stage": "finetune", "round": 1, "hospitals": 2, "epsilon": 1.0})
    tick(world)
    end(world, row, message="again")
    tick(world)
    assert world.service.studies.find(row.id).attempts == 1


def test_an_attempt_whose_process_was_killed_is_not_waited_for(world: World, text: str) -> None:
    """Flower would count it as running for another minute or two."""
    row, _ = running(world, text)
    with folder(world, row).exclusive():
        for _ in range(3):
            world.clock.pass_by(hours=1)
            tick(world)
        assert world.federation.started == [row.id]
    tick(world)
    world.clock.now += timedelta(seconds=9)
    tick(world)
    assert world.service.studies.find(row.id).attempts == 0
    first = world.service.studies.find(row.id).run_id
    world.clock.now += timedelta(seconds=2)
    tick(world)
    found = world.service.studies.find(row.id)
    assert (found.state, found.attempts) == ("running", 1)
    assert first is not None
    assert world.federation.run_status(first) == "failed"
    world.clock.now += timedelta(seconds=6)
    tick(world)
    assert world.federation.started == [row.id] * 2


def test_an_error_that_will_not_pass_fails_the_study_after_three_attempts(
    world: World, text: str
) -> None:
    row, _ = running(world, text)
    for _ in range(3):
        end(world, row, message="ValueError", is_passing=False)
        tick(world)
        world.clock.pass_by(hours=1)
        tick(world)
    found = world.service.studies.find(row.id)
    assert found.state == "failed"
    assert found.last_error == "3 attempts: ValueError"
    assert len(world.federation.started) == 3
    # The cause mended, an operator continues it.
    world.service.studies.begin(row.id, actor="anna")
    tick(world)
    assert len(world.federation.started) == 4
    assert world.service.studies.find(row.id).state == "running"


def test_a_coordinator_that_crashed_resubmits_what_no_longer_runs(
    tmp_path: Path, text: str
) -> None:
    clock = FakeClock()
    with world_at(tmp_path / "desk", clock) as world:
        row, _ = running(world, text)
        first = world.service.studies.find(row.id).run_id
    with world_at(tmp_path / "desk", clock, world.federation, world.edge) as again:
        tick(again)  # the run survived: nothing to do
        assert again.federation.started == [row.id]
    lost = FakeFederation(next_id=7)  # and now Flower's own memory is gone
    with world_at(tmp_path / "desk", clock, lost) as again:
        tick(again, 2)
        assert lost.started == [row.id]
        assert len(lost.keys) == 2
        found = again.service.studies.find(row.id)
        assert found.state == "running"
        assert found.run_id != first
        assert found.attempts == 0
        job = json.loads((folder(again, row).path / "job.json").read_text())
        assert set(job["hospitals"]) == {str(node) for node in lost.keys}


def test_a_result_written_before_the_crash_is_found(tmp_path: Path, text: str) -> None:
    clock = FakeClock()
    with world_at(tmp_path / "desk", clock) as world:
        row, _ = running(world, text)
        finish(world, row)
    with world_at(tmp_path / "desk", clock) as again:
        tick(again)
        assert again.service.studies.find(row.id).state == "finished"
        assert again.federation.started == []


def test_a_superlink_that_is_away_changes_nothing(world: World, text: str) -> None:
    row, _ = running(world, text)
    before = world.service.studies.find(row.id)
    world.federation.is_away = True
    for _ in range(3):
        with pytest.raises(UnavailableError):
            world.service.driver.tick()
    world.federation.is_away = False
    tick(world)
    assert world.service.studies.find(row.id) == before


def test_stopping_ends_the_run_also_when_flower_is_away(world: World, text: str) -> None:
    row, _ = running(world, text)
    run = world.service.studies.find(row.id).run_id
    assert run is not None
    world.federation.is_away = True
    stopped = world.service.studies.stop(row.id, actor="anna", reason="wrong file")
    assert (stopped.state, stopped.last_error) == ("stopped", "wrong file")
    world.federation.is_away = False
    assert world.federation.runs[run] == "running"
    tick(world)
    assert world.federation.runs[run] == "failed"
    tick(world, 3)
    assert len(world.federation.started) == 1
    with pytest.raises(RunError, match="found it stopped"):
        world.service.studies.stop(row.id, actor="anna")
    world.service.studies.begin(row.id, actor="anna")
    tick(world)
    assert len(world.federation.started) == 2


def test_revoking_a_hospital_stops_the_studies_it_leaves_too_small(world: World, text: str) -> None:
    row, _ = running(world, text)
    assert world.service.revoke("north", actor="local") == [row.id]
    found = world.service.studies.find(row.id)
    assert found.state == "stopped"
    assert "north was revoked" in found.last_error
    with pytest.raises(RunError, match="found 1"):
        world.service.studies.begin(row.id, actor="local")


def test_a_revoked_hospital_is_not_waited_for(world: World, text: str) -> None:
    hospitals = [world.join(name) for name in ("north", "south", "west")]
    row = world.service.studies.submit(text, None, actor="local")
    world.agree(*hospitals[:2])
    world.service.revoke("west", actor="local")
    tick(world, 2)
    assert world.federation.started == [row.id]


def test_files_are_for_hospitals_that_approved_a_finished_study(world: World, text: str) -> None:
    studies = world.service.studies
    hospitals = [world.join(name) for name in ("north", "south", "west")]
    world.join("east")
    row = studies.submit(text, ["north", "south", "west"], actor="local")
    world.agree(*hospitals[:2])
    world.agree(hospitals[2], decision="refuse")
    tick(world, 2)
    with pytest.raises(NotFoundError, match="found study running"):
        studies.file_for("north", row.digest, "result.json")
    finish(world, row)
    tick(world)
    assert studies.file_for("north", row.digest, "result.json").is_file()
    with pytest.raises(RefusalError, match="approved"):
        studies.file_for("west", row.digest, "result.json")
    with pytest.raises(NotFoundError):
        studies.file_for("east", row.digest, "result.json")
    for name in ("job.json", "../../key", "teacher.safetensors", "checkpoint.json"):
        with pytest.raises(NotFoundError):
            studies.file_for("north", row.digest, name)


def test_the_study_in_the_run_folder_is_the_one_that_was_offered(world: World, text: str) -> None:
    row, _ = running(world, text)
    _, study = RunFolder.open(folder(world, row).path)
    assert study.digest() == row.digest
    import tomllib

    assert parse_study(tomllib.loads(row.toml), origin="test").digest() == row.digest


def test_a_run_is_conducted_by_one_process_at_a_time(world: World, text: str) -> None:
    row, _ = running(world, text)
    run = folder(world, row)
    with run.exclusive(), pytest.raises(RunError, match="another process"), run.exclusive():
        pass
    with run.exclusive():
        pass
