"""*crowd*: as many clients as one likes, of whom a few take part in each round."""

from dataclasses import replace
from functools import partial

from fedmoe.data.crowd import crowd as crowd_data
from fedmoe.experiments.experiment import Experiment, with_budgets
from fedmoe.experiments.methods import Methods, Shares
from fedmoe.federated.fedavg import FedAvg
from fedmoe.federated.fedmoe import FedMoE
from fedmoe.federated.local import LocalPlan, Phase
from fedmoe.federated.rounds import Schedule
from fedmoe.nn.vision import fashion_cnn
from fedmoe.state import everything, split_state

K = 2  # experts per token
CHANNELS = (8, 16)  # of the convolutions: a device in a crowd is small


def crowd(
    seed: int = 0,
    rounds: int = 30,
    *,
    clients: int = 1000,
    per_round: int = 100,
    evaluate: int = 200,
    shares: Shares = (0.25,),
    median: int = 40,
) -> Methods:
    """Clients with about `median` images each in four domains, `per_round` of whom take part.

    Nothing but a few bytes each grows with `clients`, of which a million will do. Who comes for the
    first time scouts and trains in the same round. The closing evaluation asks `evaluate` of them.
    """
    data = crowd_data(seed, num_clients=clients, median=median)
    factory = partial(fashion_cnn, k=K, seed=seed, channels=CHANNELS)
    plan = LocalPlan((Phase(epochs=2),), lr=0.4, batch_size=20, balance=0.01, clip=1.0)
    schedule = Schedule(
        rounds,
        seed,
        clients_per_round=per_round,
        evaluate_every=5,
        evaluate_clients=evaluate,
    )
    fedmoe = FedMoE(min_experts=K, kinship=1.0, ask_newcomers=True, seed=seed)
    budgets = with_budgets(data, split_state(factory()), shares)
    base = Experiment("crowd", "fedmoe", factory, fedmoe, plan, data, budgets, schedule)
    runs = (
        base,
        replace(base, method="fedavg", strategy=FedAvg()),
        replace(
            base, method="local", strategy=FedAvg(), plan=replace(plan, personal=everything)
        ),
    )
    return {run.method: run for run in runs}
