"""What cannot work is refused before anything is written."""

from dataclasses import replace

import pytest
import torch

from fedmoe.experiments.run import check_budgets, run_experiment
from fedmoe.federated.local import check_k
from fedmoe.federated.select import memory_for
from fedmoe.nn.vision import fashion_cnn
from fedmoe.state import build_part, split_state
from fedmoe.types import ExpertId
from tests.experiments.tiny import tiny


def test_a_budget_below_one_expert_is_refused_by_client_before_anything_is_written(tmp_path):
    e = tiny()["fedmoe"]
    starved = replace(e, clients=(*e.clients[:3], replace(e.clients[3], memory_bytes=10)))
    with pytest.raises(ValueError, match="client 3: memory_bytes must be at least .*, got 10"):
        run_experiment(starved, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_budget_below_the_gates_k_is_refused_by_client():
    e = replace(tiny()["fedmoe"], factory=lambda: fashion_cnn(num_experts=4, hidden=8, k=3))
    model = split_state(e.factory())
    half = replace(e, clients=(replace(e.clients[0], memory_bytes=memory_for(model, 0.5)),))
    with pytest.raises(ValueError, match=r"client 0: .* k = 3 experts .* hold 2"):
        check_budgets(half, model)
    check_budgets(replace(half, clients=(replace(half.clients[0], memory_bytes=None),)), model)


def test_a_client_with_fewer_experts_than_k_is_told_so():
    part = frozenset({ExpertId(0, 1)})
    with torch.device("cpu"):
        model = build_part(lambda: fashion_cnn(num_experts=4, hidden=8, k=2), part)
    with pytest.raises(ValueError, match="k must be at most the 1 .* layer 0, got 2"):
        check_k(model)
