"""Every method's model fits the data of its protocol; the files of these are not needed here."""

import pytest
import torch

from fedmoe.data.examples import ClientData, Examples, FederatedData
from fedmoe.experiments import natural
from fedmoe.federated.select import experts_that_fit
from fedmoe.state import moe_layers, split_state
from fedmoe.types import ClientInfo

SHAPES = {
    "motion": ((6, 128), torch.float32, 6),
    "vowels": ((10,), torch.float32, 11),
    "shakespeare": ((16,), torch.uint8, 65),
}
NORMED = {"fedbn", "fedavg-norm", "fedmoe-norm", "ifca-norm"}
WITHOUT = {
    "motion": NORMED,
    "vowels": NORMED,
    "shakespeare": {*NORMED, "fedmix", "pfedmoe"},
}
OWN_MODEL = {"ifca", "fedmix", "pfedmoe", "fedavg", *NORMED}


def stand_in(name):
    shape, dtype, num_classes = SHAPES[name]

    def load(client: int) -> ClientData:
        draw = torch.Generator().manual_seed(client)
        x = (torch.rand(3, *shape, generator=draw) * 9).to(dtype)
        part = Examples(x, torch.arange(3))
        return ClientData(part, part, part)

    clients = tuple(ClientInfo(c, num_examples=3) for c in range(4))
    return FederatedData(name, clients, load, num_classes, "0" * 16)


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_every_method_of_a_natural_protocol_has_a_model_for_its_data(name, monkeypatch):
    monkeypatch.setattr(natural.natural, name, lambda seed: stand_in(name))
    methods = getattr(natural, name)(seed=3)
    assert {e.schedule.rounds for e in methods.values()} == {20}
    assert OWN_MODEL - methods.keys() == WITHOUT[name]
    x = stand_in(name).load(0).train.x
    models = {m: methods[m].factory() for m in ["fedmoe", *(OWN_MODEL & methods.keys())]}
    for model in models.values():
        logit_NC = model(x)
        assert logit_NC.shape == (3, SHAPES[name][2]) and logit_NC.isfinite().all()
    for method in ("fedmoe", "fedavg"):
        plain, coded = methods[method], methods[f"{method}-int8"]
        assert plain.plan == coded.plan and not plain.coded and coded.coded
    [(_, moe)], [(_, averaging)] = (moe_layers(models[m]) for m in ("fedmoe", "fedavg"))
    assert moe.gate.gate_mass == "sum" != averaging.gate.gate_mass
    for c in methods["fedmoe"].clients:  # whoever sums uses all that its device holds
        assert experts_that_fit(split_state(models["fedmoe"]), c.memory_bytes) == moe.gate.k
    own = num_parameters(models["fedmoe"])
    assert 0.9 * own < num_parameters(models["ifca"]) < 1.5 * own
    assert len(split_state(models["ifca"]).experts) == natural.NUM_MODELS
