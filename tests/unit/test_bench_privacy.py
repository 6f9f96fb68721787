"""The benchmark compares like with like: equal sums, whole steps."""

from __future__ import annotations

from simulations.bench import BENCHES
from simulations.bench.models import workloads
from simulations.bench.privacy import step_figures


def test_step_figures_are_complete_and_the_sums_agree() -> None:
    rows = step_figures({"mlp": 3, "cnn": 1, "lora": 1})
    assert set(rows) == {"mlp", "cnn", "lora"}
    for row in rows.values():
        assert set(row) == {"ours_s", "opacus_s", "plain_s", "max_abs_diff"}
        assert min(row["ours_s"], row["opacus_s"], row["plain_s"]) > 0
        assert row["max_abs_diff"] < 1e-3


def test_the_benchmark_is_known_and_its_models_have_their_size() -> None:
    assert "privacy" in BENCHES
    trained = {
        name: sum(one.numel() for one in work.make().parameters() if one.requires_grad)
        for name, work in workloads().items()
    }
    assert trained["mlp"] == 6274
    assert 25_000 < trained["cnn"] < 35_000
    assert trained["lora"] < 40_000
