"""Pictures and reports of a made-up comparison: complete, safe, and readable without a network."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib import image

from common.learning.metrics import mean_interval
from common.study import Study
from common.tasks.classification import Classification
from server.statement import privacy_statement
from server.store import environment
from simulations.comparison import CurvePoint
from simulations.plots import epsilon_plot, hospital_plot, round_plot
from simulations.report import write_report
from tests.unit.made_up import NASTY, a_comparison

AUC = Classification("diagnosis", 2).measures[0]
VOID = {"meta", "img"}


def written(
    folder: Path,
    *,
    secret_noise: bool = True,
    seeds: int = 3,
    study: Study | None = None,
    **changes: object,
) -> str:
    """The report of the made-up comparison, with the files of its first run beside it."""
    comparison = a_comparison(folder, seeds=seeds, study=study)
    study = comparison.study.revised(**changes)
    first = folder / "federated" / "seed-0"
    first.mkdir(parents=True)
    facts = {
        "hospitals": sorted(comparison.hospitals),
        "secret_noise": secret_noise,
        "teacher_parameters": 12_319,
        "student_parameters": 513,
    }
    for name, value in (
        ("result.json", facts),
        ("environment.json", environment(study)),
        ("privacy.json", privacy_statement(study, facts)),
    ):
        (first / name).write_text(json.dumps(value), encoding="utf-8")
    path = write_report(comparison)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Collects what a browser would load, and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def test_pictures_are_drawn_not_blank_and_repeatable() -> None:
    comparison = a_comparison(Path())
    drawn = (
        epsilon_plot(comparison),
        round_plot(comparison.curves, AUC),
        hospital_plot(comparison),
    )
    for one in drawn:
        assert one is not None
        assert b"<svg" in one.svg
        pixels = image.imread(io.BytesIO(one.png))
        assert pixels.shape[1] == 1200
        assert pixels[..., :3].std() > 0.05
    assert hospital_plot(comparison) == hospital_plot(comparison)


def test_nothing_to_draw_gives_no_picture() -> None:
    from dataclasses import replace

    comparison = a_comparison(Path())
    assert epsilon_plot(replace(comparison, sweep=())) is None
    assert round_plot({"finetune": (CurvePoint(1, mean_interval([float("nan")])),)}, AUC) is None


def test_one_seed_has_points_without_intervals(tmp_path: Path) -> None:
    text = Page(written(tmp_path, seeds=1)).text
    assert "One seed: no interval can be given" in text
    assert "±" not in text
    assert "none of the differences can be told from chance" in text


def test_the_report_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    source = written(tmp_path)
    page = Page(source)
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "iframe", "object", "form"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            if name in attributes:
                assert (attributes[name] or "").startswith("data:image/png;base64,")
    assert not re.search(r"https?://|url\(|@import", source)
    pictures = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(pictures) == 3
    assert all(len(one["alt"] or "") > 40 for one in pictures)
    for name in ("epsilon", "rounds", "hospitals"):
        for kind in ("png", "svg"):
            assert (tmp_path / "plots" / f"{name}.{kind}").stat().st_size > 10_000


def test_the_report_holds_every_arm_and_hospital_escaped(tmp_path: Path) -> None:
    source = written(tmp_path)
    page = Page(source)
    assert NASTY not in source
    assert "b" not in {tag for tag, _ in page.elements}
    comparison = a_comparison(tmp_path)
    for name in comparison.hospitals:
        assert page.words.count(name) == 2  # a row in each of the two tables
    for arm in comparison.arms.values():
        assert arm.title in page.words
    for heading in ("What was asked", "The comparison", "Privacy", "Limits", "How to repeat this"):
        assert heading in page.words
    assert comparison.study.digest() in page.text
    assert "12,319 parameters" in page.text and "24 times smaller" in page.text


def test_the_answer_comes_first_with_its_interval(tmp_path: Path) -> None:
    page = Page(written(tmp_path))
    answer = page.text[: page.text.index("What was asked")]
    auc = a_comparison(tmp_path).arms["federated"].student.together["auc"]
    assert f"reaches AUC {auc.mean:.3f} (95 % interval {auc.low:.3f} to {auc.high:.3f})" in answer
    assert "1 without one" in answer  # tiny has no AUC


@pytest.mark.parametrize(
    ("secret", "changes", "why"),
    [
        (False, {}, "whoever knows the seed can remove it"),
        (
            True,
            {
                "privacy__trust": "none",
                "privacy__epsilon": None,
                "privacy__delta": None,
                "evaluation__epsilon": None,
            },
            "Nothing was clipped and no noise was added",
        ),
    ],
)
def test_a_report_without_a_guarantee_says_so_loudly(
    tmp_path: Path, secret: bool, changes: dict, why: str
) -> None:
    page = Page(written(tmp_path, secret_noise=secret, **changes))
    assert any(attributes.get("class") == "alarm" for _, attributes in page.elements)
    assert "No privacy is guaranteed" in page.text[: page.text.index("What was asked")]
    assert why in page.text
    assert "differentially private with" not in page.text


def test_a_guarantee_names_unit_relation_and_both_budgets(tmp_path: Path) -> None:
    text = " ".join(Page(written(tmp_path)).text.split())
    assert "ε = 3 and δ = 1e-5 for each patient trained on" in text
    assert "ε = 2 for each patient tested on" in text
    assert "add or remove one" in text
    assert "all of them together keep no such promise" in text
