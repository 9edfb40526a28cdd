"""fluke's own FedAvg, FedPer or Ditto on clients and a start that somebody else wrote down.

    .venv-peers/bin/python simulations/peer_fluke.py JOB RESULT

Runs where fluke-fl is installed (`make peers`) and fedmoe is not; `simulations/compare_peers.py`
writes the job, starts this script and reads what it leaves. What this script brings of its own is
the reading of clients, the split of fluke's net for FedPer, and, if the job asks for it, the order
of batches; models, training, averaging and evaluation are fluke's (Polato 2024, "fluke: Federated
Learning Utility frameworK for Experimentation and research", arXiv:2412.15728).

JOB is a JSON object:

    clients          path of a .npz: for each client C = 0, 1, ... the arrays C.train.x, C.train.y,
                     C.test.x and C.test.y, images (N, 1, 28, 28) and labels (N,); C.order, the
                     order in which C takes its N training examples, (rounds, passes, N); and
                     model.NAME, the parameters of fluke's MNIST_CNN
    method           "fedavg", "fedper" or "ditto"
    order            "own": fluke shuffles; "given": by C.order
    seed, rounds, lr, batch_size, epochs
    pull, personal_epochs   of Ditto: lambda, and epochs of the personal model

RESULT will hold the `job`, `versions`, and lists over rounds of lists over clients of accuracies on
test parts: `received`, before the client trains in round 0, 1, ... and once more at the end, and
`trained`, after it trained in round 0, 1, ... Of Ditto both are of the personal model.

Shape suffixes: N examples of a client, R rounds, P passes over them.
"""

# mypy: disable-error-code="import-not-found"

import json
import math
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

NUM_CLASSES = 10
TEST_BATCH = 500  # examples

Job = Mapping[str, Any]
Arrays = Mapping[str, Tensor]


def run(job: Job) -> dict[str, list[list[float]]]:
    """Run fluke's algorithm; returns `received` and `trained`."""
    from fluke.algorithms.ditto import Ditto
    from fluke.algorithms.fedavg import FedAVG
    from fluke.algorithms.fedper import FedPer

    with np.load(job["clients"]) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    clients = Clients(job, arrays)
    prepare_environment(job["seed"])
    algorithm = {"fedavg": FedAVG, "fedper": FedPer, "ditto": Ditto}[job["method"]](
        n_clients=len(clients), data_splitter=clients, hyper_params=settings(job, arrays)
    )
    accuracies = Accuracies(job["rounds"], len(clients))
    for client in algorithm.clients:
        client.attach(accuracies)
    algorithm.run(n_rounds=job["rounds"], eligible_perc=1)
    return {"received": accuracies.received, "trained": accuracies.trained}


def prepare_environment(seed: int) -> None:
    """fluke's settings for the whole process: what is measured, and the seed."""
    from fluke import FlukeENV
    from fluke.evaluation import ClassificationEval
    from torchmetrics import Accuracy

    accuracy = Accuracy(task="multiclass", num_classes=NUM_CLASSES)
    env = FlukeENV()
    env.set_seed(seed)
    env.set_evaluator(ClassificationEval(1, NUM_CLASSES, accuracy=accuracy))
    env.set_eval_cfg(pre_fit=True, post_fit=True, server=False, locals=False)


def settings(job: Job, arrays: Arrays) -> dict[str, Any]:
    """The job as fluke's hyper-parameters."""
    from fluke.nets import MNIST_CNN, EncoderHeadNet

    net = MNIST_CNN()
    prefix = "model."
    net.load_state_dict(
        {n.removeprefix(prefix): t for n, t in arrays.items() if n.startswith(prefix)}
    )
    server_net: nn.Module = net
    client: dict[str, Any] = {
        "batch_size": job["batch_size"],
        "local_epochs": job["epochs"],
        "loss": "CrossEntropyLoss",
        "optimizer": {"name": "SGD", "lr": job["lr"]},
        "scheduler": {"name": "StepLR", "step_size": 1, "gamma": 1},
    }
    match job["method"]:
        case "fedper":
            # fluke keeps private what a net calls its head, in MNIST_CNN both linear layers.
            server_net = nn.Sequential(net.encoder, net.head.fc1, nn.ReLU())
            client["model"] = EncoderHeadNet(server_net, net.head.fc2)
        case "ditto":
            client |= {"model": net, "lam": job["pull"], "tau": job["personal_epochs"]}
    return {"client": client, "server": {"weighted": True}, "model": server_net}


class Clients:
    """The clients of a file, in place of fluke's DataSplitter."""

    def __init__(self, job: Job, arrays: Arrays) -> None:
        self.job, self.arrays = job, arrays

    def __len__(self) -> int:
        return sum(name.endswith(".train.y") for name in self.arrays)

    def assign(self, n_clients: int, batch_size: int) -> tuple[tuple[list[Any], list[Any]], None]:
        """Loaders of clients' training and test parts; the server has no data."""
        train = self.own_order if self.job["order"] == "own" else self.given_order
        tests = [self._loader(c, "test", TEST_BATCH, shuffle=False) for c in range(n_clients)]
        return ([train(c, batch_size) for c in range(n_clients)], tests), None

    def own_order(self, client: int, batch_size: int) -> Any:
        return self._loader(client, "train", batch_size, shuffle=True)

    def given_order(self, client: int, batch_size: int) -> Any:
        order_RPN = self.arrays[f"{client}.order"]
        passes = [self.job["epochs"]]
        if self.job["method"] == "ditto":
            passes.append(self.job["personal_epochs"])
        order_RPN = torch.cat([order_RPN[:, :count] for count in passes], dim=1)
        batches = GivenBatches(order_RPN.flatten(0, 1), batch_size)
        examples = TensorDataset(*self._examples(client, "train"))
        return DataLoader(examples, sampler=batches, batch_size=None)

    def _loader(self, client: int, part: str, batch_size: int, *, shuffle: bool) -> Any:
        from fluke.data import FastDataLoader

        return FastDataLoader(
            *self._examples(client, part),
            num_labels=NUM_CLASSES,
            batch_size=batch_size,
            shuffle=shuffle,
            skip_singleton=False,
        )

    def _examples(self, client: int, part: str) -> tuple[Tensor, Tensor]:
        return self.arrays[f"{client}.{part}.x"], self.arrays[f"{client}.{part}.y"]


class GivenBatches:
    """Indices of batches, in the next order whenever they are gone through."""

    def __init__(self, order_PN: Tensor, batch_size: int) -> None:
        self.orders = iter(order_PN)
        self.batch_size = batch_size
        self.num_batches = math.ceil(order_PN.shape[1] / batch_size)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Tensor]:
        return iter(next(self.orders).split(self.batch_size))


class Accuracies:
    """fluke tells it of every evaluation on a client."""

    def __init__(self, rounds: int, num_clients: int) -> None:
        self.received = [[math.nan] * num_clients for _ in range(rounds + 1)]
        self.trained = [[math.nan] * num_clients for _ in range(rounds)]

    def client_evaluation(
        self, round: int, client_id: int, phase: str, evals: Mapping[str, float]
    ) -> None:
        """fluke counts rounds from 1, and calls the end -1."""
        if phase == "pre-fit":
            self.received[round - 1 if round > 0 else -1][client_id] = evals["accuracy"]
        elif round > 0:
            self.trained[round - 1][client_id] = evals["accuracy"]


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
    job_file, result_file = (Path(name) for name in sys.argv[1:])
    job = json.loads(job_file.read_text(encoding="utf-8"))
    import_torchvision()
    versions = {name: version(name) for name in ("fluke-fl", "torch", "numpy")}
    result = {"job": job, "versions": versions, **run(job)}
    beside = result_file.with_suffix(".part")
    beside.write_text(json.dumps(result, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(result_file)


if __name__ == "__main__":
    main()
