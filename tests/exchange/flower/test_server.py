from fedmoe.exchange.flower.roster import Roster
from fedmoe.exchange.flower.server import flower_exchange
from fedmoe.experiments.run import run_experiment
from tests.exchange.flower.fake import Clock, FakeGrid, client_node, clients_of, terms_of
from tests.tiny import experiment


def test_mvp(tmp_path):
    made = experiment()
    clients = clients_of(tmp_path)
    grid = FakeGrid({100 + c: client_node(client) for c, client in clients.items()})
    clock = Clock()
    events = []
    roster = Roster(grid, terms_of(made), set(clients), events.append, clock, clock.sleep)
    roster.gather(clients, 4, 5)
    got = run_experiment(
        made,
        tmp_path / "flower",
        exchange=lambda on_client: flower_exchange(
            grid, roster, on_event=events.append, clock=clock, sleep=clock.sleep
        ),
    )
    assert got == run_experiment(made, tmp_path / "here")
    print([(e.kind, e.client, e.text, e.nbytes) for e in events])
