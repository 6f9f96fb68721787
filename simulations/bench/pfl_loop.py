"""pfl-research's native loop on its own work, without privacy: what it costs a round.

Optional: `pip install --no-deps pfl multiprocess dill` (its pins would replace our PyTorch).
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from client.hospital import Hospital
from common.features import FeatureMap
from common.models import build_teacher
from common.study import Study
from common.tasks import task_of
from simulations.bench.usual import LEARNING_RATE

_ROUNDS = 4


def round_cpu_s(study: Study, features: FeatureMap, hospitals: list[Hospital]) -> float | None:
    """Median CPU seconds of a round after the first; None where pfl is not installed."""
    if importlib.util.find_spec("pfl") is None:
        return None
    # Not installed where types are checked.
    dataset: Any = import_module("pfl.data.dataset")
    federated: Any = import_module("pfl.data.federated_dataset")
    sampling: Any = import_module("pfl.data.sampling")
    base: Any = import_module("pfl.algorithm.base")
    averaging: Any = import_module("pfl.algorithm.federated_averaging")
    simulate: Any = import_module("pfl.aggregate.simulate")
    hyper: Any = import_module("pfl.hyperparam")
    models: Any = import_module("pfl.model.pytorch")
    network = _trained_by_pfl(study, features)
    users = [
        dataset.Dataset(raw_data=[features.encode(one.train), torch.from_numpy(one.train.labels)])
        for one in hospitals
    ]
    sampler = sampling.get_user_sampler("minimize_reuse", list(range(len(users))))
    everybody = federated.FederatedDataset(users.__getitem__, sampler)
    model = models.PyTorchModel(
        network,
        torch.optim.SGD,
        torch.optim.SGD(network.parameters(), lr=1.0),
    )
    spec, clock = study.finetune, _clock()
    averaging.FederatedAveraging().run(
        base.NNAlgorithmParams(
            central_num_iterations=_ROUNDS,
            evaluation_frequency=10 * _ROUNDS,
            train_cohort_size=len(users),
            val_cohort_size=0,
        ),
        simulate.SimulatedBackend(training_data=everybody, val_data=everybody),
        model,
        hyper.NNTrainHyperParams(
            local_num_epochs=None,
            local_num_steps=spec.local_steps,
            local_learning_rate=LEARNING_RATE,
            local_batch_size=round(spec.sampling_rate * len(hospitals[0].train)),
            local_max_grad_norm=None,
        ),
        callbacks=[clock],
    )
    at: list[float] = clock.at
    return statistics.median(late - early for early, late in pairwise(at))


def _trained_by_pfl(study: Study, features: FeatureMap) -> nn.Module:
    """The study's model with the two methods that pfl asks of one."""
    network: Any = build_teacher(study, features).train()
    losses = task_of(study).loss

    def loss(inputs: Tensor, labels: Tensor, *, is_eval: bool = False) -> Tensor:
        del is_eval
        return losses(network(inputs), labels).mean()

    network.loss, network.metrics = loss, lambda *_, **__: {}
    trained: nn.Module = network
    return trained


def _clock() -> Any:
    """A callback that notes the time after each round."""
    callbacks: Any = import_module("pfl.callback.base")
    metrics: Any = import_module("pfl.metrics")

    class Clock(callbacks.TrainingProcessCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.at: list[float] = []

        def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Any]:
            self.at.append(time.process_time())
            return False, metrics.Metrics()

    return Clock()
