"""fedmoe in apps that anybody writes for themselves, as the README shows it."""

from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedmoe.data.examples import FederatedData
from fedmoe.exchange.flower.client import Client, reply
from fedmoe.exchange.flower.roster import Roster
from fedmoe.exchange.flower.server import flower_exchange
from fedmoe.exchange.flower.terms import Terms
from fedmoe.exchange.inprocess import in_process
from fedmoe.experiments.experiment import Experiment
from fedmoe.federated.fedmoe import FedMoE
from fedmoe.federated.local import LocalPlan
from fedmoe.federated.rounds import Schedule, run_rounds
from fedmoe.state import split_state, state_hash
from fedmoe.types import ClientInfo
from tests.exchange.flower.fake import FakeGrid
from tests.tiny import client_data, tiny


def test_a_strategy_runs_in_anybodys_apps_with_the_same_bits(tmp_path):
    my_model, my_data, ends = tiny, client_data, []

    # The server, in 12 lines.
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        clients = [ClientInfo(i, num_examples=12) for i in range(3)]
        terms = Terms("mine", f"mine.{context.run_id}", "mine", "fedmoe", seed=7, rounds=4)
        roster = Roster(grid, terms, clients=range(3))
        roster.gather(range(3), count=3)
        strategy = FedMoE()
        start = strategy.init(split_state(my_model()), clients)
        exchange = flower_exchange(grid, roster)
        end = run_rounds(strategy, start, clients, exchange, Schedule(4, seed=7))
        ends.append(end)

    # A client, in 14 lines.
    client = ClientApp()

    def mine(spec) -> Experiment:
        data = FederatedData("mine", (), my_data, num_classes=2, partition_hash="")
        schedule = Schedule(spec.rounds, spec.seed)
        return Experiment("mine", "fedmoe", my_model, FedMoE(), LocalPlan(), data, (), schedule)

    @client.train()
    @client.evaluate()
    @client.query()
    @client.query("hello")
    def work(message: Message, context: Context) -> Message:
        number = int(context.node_config["client-id"])
        return reply(message, Client(number, Path(tmp_path / f"client-{number}"), make=mine))

    def node(number):
        context = Context(1, number, {"client-id": number}, RecordDict(), {})
        return lambda message: client(message, context)

    server(FakeGrid({100 + i: node(i) for i in range(3)}), Context(1, 0, {}, RecordDict(), {}))

    clients = [ClientInfo(i, num_examples=12) for i in range(3)]
    there = in_process(my_model, my_data, LocalPlan(), seed=7)
    start = FedMoE().init(split_state(my_model()), clients)
    wanted = run_rounds(FedMoE(), start, clients, there, Schedule(4, seed=7))
    assert state_hash(ends[0].model) == state_hash(wanted.model)
    assert ends[0].sub_moes == wanted.sub_moes
