"""The privacy statement: what was promised, to whom, and what was charged for what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from common.errors import RunError
from common.privacy.budget import Budget, Charge, budget_of, evaluation_budget_of
from common.privacy.units import Trust
from common.study import Study
from server.store import RunFolder


def privacy_statement(study: Study, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The statement as plain data; :func:`statement_text` puts it in words.

    ``facts``: which ``hospitals`` took part, and whether all used ``secret_noise``.
    """
    budget = budget_of(study)
    privacy = study.privacy
    secret_noise = bool(facts["secret_noise"])
    return {
        "guaranteed": privacy.trust is not Trust.NONE and secret_noise,
        "secret_noise": secret_noise,
        "unit": privacy.unit.value,
        "relation": privacy.relation.value,
        "trust": privacy.trust.value,
        "released": _RELEASED[privacy.trust],
        "coalition": _coalition(study),
        "epsilon_target": privacy.epsilon,
        "epsilon_spent": budget.verified_total(),
        "delta": privacy.delta,
        "accounting": "privacy loss distributions, all stages composed; checked by dp-accounting",
        "charges": _charges(budget, study),
        "free": _free(study),
        "hospitals": facts["hospitals"],
        "study_digest": study.digest(),
    }


def recomputed_statement(run: RunFolder, study: Study) -> dict[str, Any]:
    """The statement computed anew from the stored study; raises RunError where it differs from
    the stored one, which was then edited or made by other software."""
    stored = run.read_json("privacy.json")
    anew = privacy_statement(study, stored)
    for key, value in anew.items():
        if json.loads(json.dumps(value)) != stored.get(key):
            raise RunError(
                f"{run.path / 'privacy.json'}: {key} expected {value!r} from the study, "
                f"found {stored.get(key)!r}; do not rely on this statement"
            )
    return anew


_RELEASED = {
    Trust.NONE: "Nothing that is protected",
    Trust.LOCAL: "Every hospital's releases, seen together by anyone,",
    Trust.DISTRIBUTED: "The noised sums over all hospitals, which are all that can be read,",
}


def _coalition(study: Study) -> str:
    """Against whom the guarantee holds."""
    federation = study.federation
    if study.privacy.trust is Trust.LOCAL:
        return (
            "The guarantee holds against the coordinator, all other hospitals together, and every "
            'reader of the models: each hospital\'s noise alone suffices (trust = "local").'
        )
    if study.privacy.trust is Trust.DISTRIBUTED and federation.hospitals is not None:
        honest = (
            federation.hospitals - federation.tolerated_dropouts - federation.tolerated_colluders
        )
        return (
            f"The guarantee holds against every reader of the models, and against the coordinator "
            f"together with any {federation.tolerated_colluders} of the {federation.hospitals} "
            f"hospitals, as long as at least {honest} others follow the protocol and add their "
            f'noise (trust = "distributed"). It does not hold against a coordinator with more '
            f"colluding hospitals; with all but one it sees the last one's part under that "
            f"hospital's share of the noise alone."
        )
    return "There is no guarantee."


def _charges(budget: Budget, study: Study) -> list[dict[str, Any]]:
    rows = [_row(one, "training", budget.spent(one.stage, one.rounds)) for one in budget.charges]
    # Spare ones are listed whether or not they were needed: the total holds either way.
    rows += [_row(one, "training", budget.total()) for one in budget.spare]
    testing = evaluation_budget_of(study)
    if testing is not None:
        spent = testing.verified_total()
        rows += [_row(one, "testing", spent) for one in (*testing.charges, *testing.spare)]
    return rows


def _row(charge: Charge, patients: str, epsilon_after: float | None) -> dict[str, Any]:
    return {
        "stage": charge.stage,
        "patients": patients,
        "rounds": charge.rounds,
        "steps_per_round": charge.steps_per_round,
        "sampling_rate": charge.plan.sampling_rate,
        "noise_multiplier": charge.plan.noise_multiplier,
        "clip_norm": charge.plan.clip_norm,
        "epsilon_after": epsilon_after,
    }


def _free(study: Study) -> list[str]:
    items = [f"pre-training on the public corpus ({study.public.kind})"]
    if study.distill.on == "public":
        items.append("distillation on public records: post-processing of the private teacher")
    items.append("declared numbers of patients: each hospital's own rounded public word")
    return items


def _testing_promise(statement: dict[str, Any]) -> str:
    for row in statement["charges"]:
        if row["patients"] == "testing":
            return (
                f", and (ε = {row['epsilon_after']:.3g}, δ = {statement['delta']:g}) for each "
                f"testing {statement['unit']}; nobody is both"
            )
    return ""


def statement_text(statement: dict[str, Any]) -> str:
    """The statement in words, as Markdown."""
    unit = statement["unit"]
    if statement["trust"] == Trust.NONE.value:
        promise = (
            "**No privacy guarantee.** This run clipped nothing and added no noise; it may "
            "only be made on public data, for comparison."
        )
    elif not statement["secret_noise"]:
        promise = (
            "**No privacy guarantee.** At least one hospital used test noise, which whoever "
            "knows the seed can remove, or kept no record of what it had spent."
        )
    else:
        promise = (
            f"{statement['released']} are "
            f"(ε = {statement['epsilon_spent']:.3g}, δ = {statement['delta']:g})-differentially "
            f"private for each training {unit} ({statement['relation'].replace('_', ' ')})"
            f"{_testing_promise(statement)}. "
            f"{statement['coalition']} It does not hold against who reads the hospitals' own "
            f"machines."
        )
    lines = [
        "# Privacy statement",
        "",
        promise,
        "",
        "| stage | charged to | rounds × steps | "
        "sampling rate | noise multiplier | clip norm | ε after |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in statement["charges"]:
        after = "—" if row["epsilon_after"] is None else f"{row['epsilon_after']:.3f}"
        noise = "—" if row["noise_multiplier"] is None else f"{row['noise_multiplier']:.3f}"
        lines.append(
            f"| {row['stage']} | {row['patients']} patients | {row['rounds']} × "
            f"{row['steps_per_round']} | {row['sampling_rate']:g} | {noise} | "
            f"{row['clip_norm']:.3g} | {after} |"
        )
    lines += ["", "Not charged, because no patient's record enters:", ""]
    lines += [f"- {item}" for item in statement["free"]]
    lines += ["", f"Study digest: `{statement['study_digest']}`", ""]
    return "\n".join(lines)
