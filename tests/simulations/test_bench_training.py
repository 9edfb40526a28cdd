"""What the benchmark of training compares does the same work; its rows say what was measured."""

import pytest
import torch

from fedmoe.data.examples import Examples
from fedmoe.federated.local import LocalPlan
from fedmoe.native import client as native
from simulations import bench_training as bench
from simulations.peer_training import net_of


@pytest.mark.parametrize("job", bench.JOBS.values(), ids=bench.JOBS)
def test_the_peers_networks_compute_what_ours_do(job):
    model = job.factory()
    arrays = {f"model.{name}": value for name, value in model.state_dict().items()}
    theirs = net_of({"net": job.net}, arrays)
    x = torch.randn(9, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs(x), model(x), rtol=0, atol=1e-5)
    loss = theirs.loss(x, torch.arange(9))
    assert loss.item() == pytest.approx(
        torch.nn.functional.cross_entropy(model(x), torch.arange(9)).item(), abs=1e-5
    )


def test_all_ways_train_every_client():
    case = bench.STEPS[0]
    draw = torch.Generator().manual_seed(0)
    data = [Examples(torch.randn(6, 1, 28, 28, generator=draw), torch.arange(6)) for _ in range(2)]
    ways = [bench.eager, bench.one_by_one, bench.by_batched]
    for way in [*ways, bench.by_compiled] if native.available() else ways:
        models = [case.factory() for _ in data]
        way(models, data, LocalPlan(lr=0.1, batch_size=4))
        start = case.factory().state_dict()
        for model in models:
            assert not torch.equal(model.state_dict()["1.weight"], start["1.weight"])


def test_rows_hold_medians_and_their_ratio():
    found = {
        ("moe", "in process"): [2.0, 1.0, 9.0],
        ("moe", "2 actors"): [1.0],
        ("moe", "Flower"): [6.0, 7.0],
        ("cnn", "in process"): [1.0],
    }
    rows = bench.round_rows(found)
    assert [(r["side"], r["peer"], r["ratio"]) for r in rows] == [
        ("in process", "Flower", 3.25),
        ("2 actors", "Flower", 6.5),
    ]
    steps = bench.step_rows(bench.STEPS[0], {"eager": 100.0, "compiled": 8.0, "ceiling": 4.0})
    assert [(r["peer"], r["ratio"]) for r in steps] == [("eager", 12.5), ("ceiling", 0.5)]
