"""What `--set` understands, and what it refuses before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import StudyError
from common.study import Study
from simulations.combinations import combine, known_keys, parse_settings


def test_every_combination_is_a_study_of_its_own(small: Study) -> None:
    settings = parse_settings(["privacy.epsilon=0.5,1", "finetune.rounds=3,5,7"])
    found = combine(small, settings)
    assert [(one.study.privacy.epsilon, one.study.finetune.rounds) for one in found] == [
        (epsilon, rounds) for epsilon in (0.5, 1.0) for rounds in (3, 5, 7)
    ]
    assert len({one.arm for one in found}) == 6
    assert found[0].arm == "privacy.epsilon=0.5,finetune.rounds=3"
    assert found[0].study == small.revised(privacy__epsilon=0.5, finetune__rounds=3)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("federation.rule=fedavg,fedadam", ("fedavg", "fedadam")),
        ("teacher.hidden=[64, 32],[128]", ([64, 32], [128])),
        ("teacher.skip=true,false", (True, False)),
        ("finetune.optimiser.learning_rate=1e-3,0.5", (1e-3, 0.5)),
        ('federation.rule="fedavg"', ("fedavg",)),
    ],
)
def test_values_are_those_of_a_study_file(text: str, values: tuple) -> None:
    assert parse_settings([text])[0].values == values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("privacy.epsilom=1", ["privacy.epsilom: unknown key", "did you mean 'privacy.epsilon'"]),
        ("federation.rounds=10", ["unknown key", "'finetune.rounds'"]),
        ("finetune.optimizer.learning_rate=1", ["'finetune.optimiser.learning_rate'"]),
        ("privacy=1", ["privacy: unknown key", "did you mean"]),
        ("seed=1,2", ["--seeds"]),
        ("privacy.epsilon", ["KEY=VALUE"]),
        ("privacy.epsilon=", ["KEY=VALUE"]),
        ("privacy.epsilon=1,1.0", ["different values"]),
    ],
)
def test_what_no_study_has_is_refused_in_one_line(text: str, words: list[str]) -> None:
    with pytest.raises(StudyError) as refusal:
        parse_settings([text])
    assert "\n" not in str(refusal.value)
    for word in words:
        assert word in str(refusal.value)


def test_an_impossible_combination_is_named(small: Study) -> None:
    settings = parse_settings(["evaluation.folds=2,4", "evaluation.fold=0,3"])
    with pytest.raises(StudyError, match=r"evaluation.folds = 2, evaluation.fold = 3: .*found 3"):
        combine(small, settings)
    with pytest.raises(StudyError, match="each key once"):
        combine(small, parse_settings(["finetune.rounds=1", "finetune.rounds=2"]))


def test_names_are_folders_and_never_shared(small: Study) -> None:
    settings = parse_settings(['public.source.path="../a/b","a b","ab"'])
    assert "public.source.path" in known_keys()
    source = {"kind": "csv", "path": "x.csv"}
    study = small.revised(public={"kind": "file", "source": source})
    names = [one.arm for one in combine(study, settings)]
    assert len(set(names)) == 3
    assert all(Path(name).name == name for name in names)
