"""The contender pfl-research, in an environment of its own (``requirements.txt``)."""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import time
from typing import Any

import numpy as np
import round_work as work
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from pfl.privacy.gaussian_mechanism import GaussianMechanism
from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism
from torch.nn import functional as F


class _Model(torch.nn.Module):
    """A model with the two functions that pfl asks for."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = work.model_of(kind)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.inner(inputs)

    def loss(self, inputs: Any, labels: Any, eval: bool = False) -> torch.Tensor:
        self.train(not eval)
        return F.cross_entropy(self(torch.as_tensor(inputs)), torch.as_tensor(labels))

    def metrics(self, inputs: Any, labels: Any, eval: bool = True) -> dict[str, Any]:
        return {}


class _Clock(TrainingProcessCallback):
    """Notes when each round ends."""

    def __init__(self) -> None:
        self.marks = [time.perf_counter()]

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        self.marks.append(time.perf_counter())
        return False, Metrics()


def run(
    kind: str, population: int, cohort: int, rounds: int, private: bool, began: float
) -> tuple[float, list[float], float]:
    """Return seconds until the first round began, seconds of each round, and final accuracy."""
    module, rng = _Model(kind), np.random.default_rng(0)
    model = PyTorchModel(
        model=module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )

    def dataset_of(user: int) -> Dataset:
        data = work.client(user)
        return Dataset(raw_data=[data.inputs, data.labels], user_id=str(user))

    mechanism = CentrallyAppliedPrivacyMechanism(GaussianMechanism(1.0, work.SIGMA))
    backend = SimulatedBackend(
        training_data=FederatedDataset(dataset_of, lambda: int(rng.integers(population))),
        val_data=None,  # type: ignore[arg-type]
        postprocessors=[mechanism] if private else [],
    )
    clock = _Clock()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds + 1,
            train_cohort_size=cohort,
            val_cohort_size=0,
        ),
        backend=backend,
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=work.LEARNING_RATE,
            local_batch_size=work.BATCH,
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[clock],
    )
    times = [float(seconds) for seconds in np.diff(clock.marks)]
    return clock.marks[0] - began, times, work.accuracy(module)
