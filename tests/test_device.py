import pytest
import torch

from fedmoe.device import autocast, keep_freed_memory, peak_memory, pick_device

CPU = torch.device("cpu")
KB = 1024


def floats(kilobytes):
    return torch.zeros(kilobytes * KB // 4)


def test_an_explicit_device_is_honoured():
    assert pick_device("cpu") == CPU
    assert pick_device(CPU) == CPU


def test_without_a_wish_the_gpu_is_taken_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device().type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == CPU


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cuda:0").index == 0
    with pytest.raises(ValueError, match="1 GPUs here or the CPU, got 'cuda:1'"):
        pick_device("cuda:1")


@pytest.mark.parametrize(
    "enabled, dtype", [(None, torch.float32), (False, torch.float32), (True, torch.bfloat16)]
)
def test_autocast_on_a_cpu_is_off_unless_asked_for(enabled, dtype):
    with autocast(CPU, enabled):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_autocast_on_a_gpu_is_bfloat16_unless_refused():
    context = autocast(torch.device("cuda"))
    assert isinstance(context, torch.autocast) and context.fast_dtype == torch.bfloat16
    assert not isinstance(autocast(torch.device("cuda"), False), torch.autocast)


def test_peak_memory_of_a_sequence_worked_by_hand():
    def step():
        a = floats(1)  # 1
        b = floats(2)  # 1 + 2
        del a  # 2
        c = floats(4)  # 2 + 4
        del b, c  # 0
        floats(5)  # 5

    assert peak_memory(step, CPU) == 6 * KB


def test_views_take_no_memory():
    def step():
        a = floats(4)
        _ = a.view(2, -1).t()[0], a[:10], a.detach()

    assert peak_memory(step, CPU) == 4 * KB


def test_what_was_there_before_does_not_count():
    before = floats(8)

    def step():
        _ = before.view(2, -1).t()  # of a storage that is only now seen
        before.add_(1)
        _ = before[: KB // 4] + 1  # 1

    assert peak_memory(step, CPU) == 1 * KB


def test_what_the_graph_saves_counts_until_the_backward_pass_frees_it():
    x = floats(1).requires_grad_()

    def forward_only():
        x.exp().exp().exp()  # each exp saves its result: 3 of 1

    def without_graph():
        with torch.no_grad():
            x.exp().exp().exp()  # one is freed as soon as the next is there: 2 of 1

    assert peak_memory(forward_only, CPU) == 3 * KB
    assert peak_memory(without_graph, CPU) == 2 * KB


def test_gradients_count():
    w = floats(4).requires_grad_()

    def step():
        w.sum().backward()  # the sum and the 1 that starts the backward pass: 4 bytes each

    assert 4 * KB <= peak_memory(step, CPU) <= 4 * KB + 8
    assert w.grad is not None


def test_a_second_measurement_starts_from_nothing():
    kept = []
    assert peak_memory(lambda: kept.append(floats(3)), CPU) == 3 * KB
    assert peak_memory(lambda: kept.append(floats(1)), CPU) == 1 * KB


def test_keeping_freed_memory_can_be_asked_for_again():
    assert keep_freed_memory() == keep_freed_memory()
