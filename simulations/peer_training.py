"""fluke's or pfl's own FedAvg, timed, on clients and a start that somebody else wrote down.

    .venv-peers/bin/python simulations/peer_training.py < JOB

Runs where fluke-fl and pfl are installed (`make peers`) and fedmoe is not;
`simulations/bench_training.py` writes the job and reads what is printed last: a list with the
seconds of each round. Only the networks and the reading of clients are of this script; training,
averaging and the loop over rounds are the peers' own. Nothing is evaluated. pfl shares the clients
out over two processes (torchrun), as it advises for speed; fluke has one.

JOB is a JSON object:

    peer       "fluke-fl" or "pfl"
    net        "cnn" or "moe"
    clients    path of a .npz: for each client C = 0, 1, ... the arrays C.x and C.y, images
               (N, 1, 28, 28) and labels (N,), and model.NAME, the parameters to start from
    rounds, lr, batch_size

Shape suffixes: N examples, D width, C classes.
"""

# mypy: disable-error-code="import-not-found"

import json
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

NUM_CLASSES = 10
PROCESSES = 2  # of pfl

Job = Mapping[str, Any]
Data = list[tuple[Tensor, Tensor]]


class Stem(nn.Module):
    """Two convolutions, with the layout and the order that are fastest in torch on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 5), nn.Conv2d(32, 64, 5)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        for conv in (self.conv1, self.conv2):
            x = nn.functional.max_pool2d(conv(x), 2).relu()
        return x.flatten(1)


class TwoLayers(nn.Module):
    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, out)

    def forward(self, x_ND: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x_ND).relu())
        return y


class Gate(nn.Module):
    def __init__(self, dim: int, experts: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, experts, bias=False)


class Mixture(nn.Module):
    """Each example goes to the expert of the highest score, which weighs it, one after another."""

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.gate = Gate(dim, experts)
        names = map(str, range(experts))
        self.experts = nn.ModuleDict({name: TwoLayers(dim, hidden, dim) for name in names})

    def forward(self, x_ND: Tensor) -> Tensor:
        weight_N, best_N = self.gate.proj(x_ND).softmax(-1).max(-1)
        y_ND = torch.zeros_like(x_ND)
        for name, expert in self.experts.items():
            chosen = (best_N == int(name)).nonzero().squeeze(-1)
            if len(chosen):
                y_ND = y_ND.index_add(0, chosen, expert(x_ND[chosen]) * weight_N[chosen, None])
        return y_ND


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.inner(x)
        return y


class Net(nn.Sequential):
    """With what pfl asks of a model."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        return {}


def net_of(job: Job, arrays: Mapping[str, Tensor]) -> Net:
    """The network with the parameters to start from."""
    if job["net"] == "cnn":
        net = Net(Stem(), TwoLayers(1024, 512, NUM_CLASSES))
        told = {"stem.": "0.", "head.": "1."}
    else:
        mixture = Residual(Mixture(64, 128, 8))
        net = Net(
            nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), mixture, nn.Linear(64, NUM_CLASSES)
        )
        told = {}
    state = {}
    for name, value in arrays.items():
        if name.startswith("model."):
            own = name.removeprefix("model.")
            for theirs, ours in told.items():
                own = ours + own.removeprefix(theirs) if own.startswith(theirs) else own
            state[own] = value
    net.load_state_dict(state)
    return net


def read(job: Job) -> tuple[Net, Data]:
    with np.load(job["clients"]) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    count = sum(name.endswith(".y") for name in arrays)
    return net_of(job, arrays), [(arrays[f"{c}.x"], arrays[f"{c}.y"]) for c in range(count)]


def fluke(job: Job) -> list[float]:
    import_torchvision()
    from fluke import FlukeENV
    from fluke.algorithms.fedavg import FedAVG
    from fluke.data import FastDataLoader

    net, data = read(job)
    env = FlukeENV()
    env.set_seed(0)
    env.set_eval_cfg(pre_fit=False, post_fit=False, server=False, locals=False)

    class Clients:
        """In place of fluke's DataSplitter."""

        def assign(self, n_clients: int, batch_size: int) -> Any:
            loaders = [
                FastDataLoader(*own, num_labels=NUM_CLASSES, batch_size=batch_size, shuffle=True,
                               skip_singleton=False)
                for own in data
            ]  # fmt: skip
            return (loaders, [None] * n_clients), None

    class Clock:
        """fluke tells it of rounds."""

        def __init__(self) -> None:
            self.spans: list[float] = []
            self.began_s = 0.0

        def start_round(self, round: int, global_model: Any) -> None:
            self.began_s = time.perf_counter()

        def end_round(self, round: int) -> None:
            self.spans.append(time.perf_counter() - self.began_s)

    settings = {
        "client": {
            "batch_size": job["batch_size"],
            "local_epochs": 1,
            "loss": "CrossEntropyLoss",
            "optimizer": {"name": "SGD", "lr": job["lr"]},
            "scheduler": {"name": "StepLR", "step_size": 1, "gamma": 1},
        },
        "server": {"weighted": True},
        "model": net,
    }
    algorithm = FedAVG(n_clients=len(data), data_splitter=Clients(), hyper_params=settings)
    clock = Clock()
    algorithm.attach(clock)
    algorithm.run(n_rounds=job["rounds"], eligible_perc=1)
    return clock.spans


def pfl(job: Job) -> list[float]:
    """In each of its processes."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam.base import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    net, data = read(job)
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0))
    clients = {c: list(own) for c, own in enumerate(data)}

    def dataset(weights: Mapping[int, int] | None) -> Any:
        from pfl.data.dataset import Dataset

        sampler = get_user_sampler("minimize_reuse", list(clients))
        made = {c: Dataset(own, user_id=c) for c, own in clients.items()}
        return FederatedDataset(made.__getitem__, sampler, weights)

    ends = [time.perf_counter()]

    class Clock(TrainingProcessCallback):  # type: ignore[misc]
        def after_central_iteration(self, *args: Any, **kwargs: Any) -> Any:
            ends.append(time.perf_counter())
            return False, Metrics()

    training = dataset({c: len(y) for c, (_, y) in enumerate(data)})
    backend = SimulatedBackend(training, training, [WeightByDatapoints()])
    rounds = job["rounds"]
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds, evaluation_frequency=10**6,
            train_cohort_size=len(data), val_cohort_size=0,
        ),
        backend,
        model,
        NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=job["lr"], local_batch_size=job["batch_size"]
        ),
        callbacks=[Clock()],
    )  # fmt: skip
    return [b - a for a, b in pairwise(ends)]


def import_torchvision() -> None:
    """PyPI's torchvision for Linux is built for CUDA, and a torch without CUDA cannot load it.

    fluke imports it and uses nothing of it. The import wants two operators to be declared.
    """
    try:
        import torchvision
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}",
                "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            )
        import torchvision  # noqa: F401


def main() -> None:
    torch.set_num_threads(1)
    if "LOCAL_RANK" in os.environ:  # one of pfl's processes
        spans = pfl(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
        if os.environ["RANK"] == "0":
            print(json.dumps(spans), flush=True)
        return
    job = json.load(sys.stdin)
    if job["peer"] == "fluke-fl":
        print(json.dumps(fluke(job)), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        processes = f"--nproc-per-node={PROCESSES}"
        sys.argv = ["torchrun", "--standalone", processes, __file__, str(path)]
        runpy.run_module("torch.distributed.run", run_name="__main__")


if __name__ == "__main__":
    main()
