"""The parts every report shares: what was asked, what is promised, how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.dictionary import Dictionary
from common.files import write_atomically
from common.privacy.units import Trust
from common.sources import SourceSpec
from common.study import Study
from common.tasks import Measure
from simulations.comparison import CurvePoint
from simulations.drawing import Picture
from simulations.markup import (
    Content,
    Html,
    data_table,
    element,
    listed,
    paragraph,
    picture,
    section,
    terms,
)
from simulations.measures import capital, in_words, leading

FEW_TEST_PATIENTS = 30
SIMULATED = (
    "This is a simulation: the exact figures can be known because the researcher stands in every "
    "hospital at once. A coordinator of real hospitals would see noised figures at most."
)
_PARTITIONS = {
    "equal": "of equal size",
    "power_law": "of unequal size (a few large, several small)",
    "label_skew": "whose shares of each class differ (label skew)",
    "covariate_shift": "whose patients differ in one column (covariate shift)",
    "scaffold": "that share no scaffold",
    "sites": "as the data name them",
}
_STAGES = {
    "statistics": "scaling statistics",
    "finetune": "fine-tune teacher",
    "distill": "distil student",
    "evaluate": "evaluate student",
}
_RELATIONS = {
    "add_or_remove_one": "one {unit}'s presence or absence changes what leaves only within ε and δ",
    "replace_one": "exchanging one {unit} for another changes what leaves only within ε and δ",
}


def study_section(
    study: Study, hospitals: Mapping[str, str], facts: Mapping[str, Any], seeds: Sequence[int]
) -> Html:
    """The study in words. ``hospitals``: each one's declared patients; ``facts``: result.json."""
    teacher, student = facts["teacher_parameters"], facts["student_parameters"]
    return section(
        "What was asked",
        terms(
            [
                ("task", f"{study.task}: {study.dictionary.label.words()}"),
                ("data", _data_words(study)),
                ("inputs", _input_words(study.dictionary)),
                (
                    "hospitals",
                    f"{len(hospitals)}, with the training patients each declares (rounded): "
                    + ", ".join(f"{name} {size}" for name, size in hospitals.items()),
                ),
                (
                    "tested on",
                    f"one of {study.evaluation.folds} equal parts of each hospital's "
                    f"patients, never trained on",
                ),
                ("public data", _public_words(study)),
                (
                    "teacher",
                    f"{teacher:,} parameters, pre-trained for {study.pretrain.steps} steps on "
                    f"the public data; the hospitals train "
                    + _PARTS[study.finetune.trainable]
                    + f" for {study.finetune.rounds} rounds of {study.finetune.local_steps} "
                    + ("step" if study.finetune.local_steps == 1 else "steps"),
                ),
                (
                    "student",
                    f"{student:,} parameters, {teacher / student:.0f} times smaller; learns "
                    f"from the teacher on "
                    + ("public records" if study.distill.on == "public" else "patients, charged"),
                ),
                (
                    "federation",
                    f"{study.federation.rule}, at least "
                    f"{study.federation.minimum_hospitals} hospitals a round",
                ),
                ("seeds", ", ".join(str(one) for one in seeds)),
            ]
        ),
    )


def privacy_section(statement: Mapping[str, Any], *, extra: Sequence[str] = ()) -> Html:
    """The privacy statement; says loudly when nothing is guaranteed."""
    none = statement["trust"] == Trust.NONE.value
    unit = statement["unit"]
    delta = f"{statement['delta'] or 0:g}".replace("e-0", "e-")
    if none:
        promise = element(
            "p",
            element("strong", "No privacy is guaranteed. "),
            "Nothing was clipped and no noise was added. Such a study may only be run on public "
            "data, for comparison.",
            class_="alarm",
        )
    elif not statement["guaranteed"]:
        promise = element(
            "p",
            element("strong", "No privacy is guaranteed. "),
            "The noise came from a seed (test noise): whoever knows the seed can remove it. The "
            "figures below are what secret noise of the same size would have promised.",
            class_="alarm",
        )
    else:
        promise = paragraph(
            "Each hospital's releases, seen together by anyone, are differentially private with ",
            element("strong", f"ε = {statement['epsilon_spent']:.3g} and δ = {delta}"),
            f" for each {unit} trained on",
            *_tested_words(statement),
            ". It holds against the coordinator, all other hospitals together and every reader of "
            "the models, because each hospital adds all of its own noise. It does not hold against "
            "whoever reads a hospital's own machines.",
        )
    facts: list[tuple[str, Content]] = [
        (
            "unit",
            f"{unit}: all of one {unit}'s records together are clipped once"
            if unit == "patient"
            else f"{unit}: every record is another patient's",
        ),
        (
            "relation",
            f"{statement['relation'].replace('_', ' ')}: "
            + _RELATIONS[statement["relation"]].format(unit=unit),
        ),
        ("trust", statement["trust"]),
    ]
    if not none:
        facts += [
            (
                "ε",
                f"{statement['epsilon_spent']:.4g} of {statement['epsilon_target']:g} granted "
                f"to training",
            ),
            ("δ", delta),
            ("accounting", statement["accounting"]),
        ]
    return section(
        "Privacy",
        promise,
        terms(facts),
        _charges_table(statement, none),
        paragraph("Not charged, because no patient's record enters:"),
        listed(statement["free"]),
        *(paragraph(one) for one in extra),
    )


def reproduce_section(
    command: str, environment: Mapping[str, Any], *, where: str, exact: bool
) -> Html:
    """The command, the digest and the versions. ``exact``: the noise came from a seed."""
    noise = (
        "Its noise came from a seed, so the same versions give the same figures."
        if exact
        else "Its noise is secret, so a repetition agrees within the intervals, not digit by digit."
    )
    versions = [
        f"python {environment['python']}",
        *(f"{name} {version}" for name, version in environment["packages"].items()),
    ]
    return section(
        "How to repeat this",
        element("pre", element("code", command)),
        paragraph(
            "The study with every setting spelled out is ",
            element("code", where),
            f" beside this report. {noise}",
        ),
        terms(
            [
                ("study digest", element("code", environment["study_digest"])),
                ("versions", ", ".join(versions)),
            ]
        ),
    )


def _tested_words(statement: Mapping[str, Any]) -> list[Content]:
    granted = [row["epsilon_after"] for row in statement["charges"] if row["stage"] == "evaluate"]
    if not granted:
        return []
    return [
        ", and with ",
        element("strong", f"ε = {granted[0]:.3g}"),
        f" for each {statement['unit']} tested on (nobody is both)",
    ]


def _charges_table(statement: Mapping[str, Any], none: bool) -> Html:
    rows = []
    for row in statement["charges"]:
        after = None if none else row["epsilon_after"]
        noise = None if none else row["noise_multiplier"]
        rows.append(
            (
                _STAGES.get(row["stage"], row["stage"]),
                f"{row['patients']} {statement['unit']}s",
                f"{row['rounds']} × {row['steps_per_round']}",
                f"{row['sampling_rate']:g}",
                "—" if noise is None else f"{noise:.3f}",
                "—" if none else f"{row['clip_norm']:.3g}",
                "none" if after is None else f"{after:.3f}",
            )
        )
    return data_table(
        "What was charged for what",
        (
            "stage",
            "charged to",
            "rounds × steps",
            "sampling rate",
            "noise multiplier",
            "clip norm",
            "ε after",
        ),
        rows,
        names=2,
    )


_PARTS = {
    "head": "its head",
    "lora": "its head and low-rank corrections",
    "all": "all of it",
}


def _data_words(study: Study) -> str:
    spec = study.simulation
    if spec is None:
        return "each hospital's own"
    if spec.source is not None:
        return (
            f"{_source_words(spec.source)}, cut into {spec.hospitals} hospitals "
            f"{_PARTITIONS[spec.partition]}"
        )
    return "one source per hospital: " + ", ".join(
        f"{one.name} ({_source_words(one.source)})" for one in spec.hospital
    )


def _source_words(source: SourceSpec) -> str:
    if source.kind == "sklearn":
        return f"{source.path.replace('_', ' ')}, a data set that comes with scikit-learn"
    return ", ".join([source.path, *source.also]) if source.kind == "csv" else source.path


def _input_words(dictionary: Dictionary) -> str:
    if dictionary.image_shape is not None:
        height, width = dictionary.image_shape
        return f"an image of {height} × {width} pixels"
    if dictionary.modality == "molecule":
        return "a molecule, given as SMILES"
    if dictionary.text is not None:
        pieces = "bytes" if dictionary.text.tokenizer == "bytes" else "tokens"
        return f"a text of up to {dictionary.text.length} {pieces}"
    kinds = [column.kind for column in dictionary.columns]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    optional = sum(column.optional for column in dictionary.columns)
    return f"{len(kinds)} columns ({counts}); " + (
        f"{optional} may be missing" if optional else "none may be missing"
    )


def _public_words(study: Study) -> str:
    public = study.public
    if public.kind == "held_apart":
        return (
            f"{public.fraction:.0%} of the patients, set aside without labels; they are in no "
            f"hospital"
        )
    if public.kind == "file":
        assert public.source is not None  # noqa: S101  (the study refuses it otherwise)
        return f"{_source_words(public.source)}, at the coordinator"
    return f"{public.records} records drawn from the dictionary alone; no patient at all"


def saved_picture(folder: Path, name: str, drawn: Picture, *, alt: str, caption: str) -> Html:
    """Keep PNG and SVG beside the report, and embed the PNG."""
    write_atomically(folder / "plots" / f"{name}.png", drawn.png)
    write_atomically(folder / "plots" / f"{name}.svg", drawn.svg)
    return picture(drawn.png, alt=alt, caption=caption)


def curve_words(curves: Mapping[str, Sequence[CurvePoint]], measure: Measure) -> str:
    """The round curve for those who cannot see it."""
    said = [
        f"{stage}: round {points[0].round} {in_words(points[0].figure, measure)}, "
        f"round {points[-1].round} {in_words(points[-1].figure, measure)}"
        for stage, points in curves.items()
        if points
    ]
    return f"{capital(measure.title)} after each federated round. {'; '.join(said)}."


def curve_caption(study: Study) -> str:
    """What the round curve shows."""
    tail, ema = study.federation.tail_average, study.federation.ema
    rounds = (
        f"all rounds, each counting {ema:g} times as much as the next,"
        if ema
        else f"the last {tail:.0%} of the rounds,"
    )
    averaged = (
        f" The last point is the average of {rounds} which is what the study keeps."
        if ema or tail
        else ""
    )
    title = capital(leading(study).title)
    return f"{title} on all hospitals' test patients after each round.{averaged}"


def small_hospitals(tested: Mapping[str, int]) -> list[str]:
    """The limit that small test sets set. ``tested``: each hospital's test patients."""
    few = {name: count for name, count in tested.items() if count < FEW_TEST_PATIENTS}
    if not few:
        return []
    smallest = min(few, key=lambda name: (few[name], name))
    return [
        f"{len(few)} of {len(tested)} hospitals test on fewer than {FEW_TEST_PATIENTS} "
        f"patients. At {smallest}, with {few[smallest]}, one patient is {1 / few[smallest]:.2f} of "
        f"all that is measured there: single hospitals' figures are rough."
    ]


def write_page(folder: Path, text: str) -> Path:
    """Write ``report.html`` into ``folder``; its path."""
    path = folder / "report.html"
    write_atomically(path, text.encode())
    return path
