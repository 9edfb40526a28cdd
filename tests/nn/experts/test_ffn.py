import pytest
import torch

from fedmoe.nn.experts.ffn import FFN


def test_ffn_worked_by_hand():
    ffn = FFN(1, 2, out=1)
    ffn.up.weight.data = torch.tensor([[2.0], [-1.0]])
    ffn.up.bias.data = torch.tensor([1.0, 0.0])
    ffn.down.weight.data = torch.tensor([[10.0, 100.0]])
    ffn.down.bias.data = torch.tensor([5.0])
    # x=3: relu(2*3+1)=7, relu(-3)=0 -> 75.  x=-2: relu(-3)=0, relu(2)=2 -> 205.
    assert ffn(torch.tensor([[3.0], [-2.0]])).tolist() == [[75.0], [205.0]]


def test_parameter_names_are_up_and_down():
    assert list(FFN(2, 3).state_dict()) == ["up.weight", "up.bias", "down.weight", "down.bias"]


def test_without_biases_there_are_two_matrices_and_zero_stays_zero():
    ffn = FFN(2, 3, bias=False)
    assert list(ffn.state_dict()) == ["up.weight", "down.weight"]
    assert not ffn(torch.zeros(1, 2)).any()


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match='"relu" or "gelu", got \'tanh\''):
        FFN(2, 3, activation="tanh")
