"""The MoE layer's training step against the plain loop over experts, and against bare matmuls.

    python -m simulations.bench_layer --json [--full] [--default-allocator]

One step is the layer's forward and backward pass, gate included. The experts are two linear maps
around a ReLU; without biases, except in the CNN's head, which has them. The floor is what no layer
can beat: the six dense matrix products of such an expert (two forward, four backward) over as many
rows as the tokens have experts, all by one and the same expert, in memory set aside before. All
three take turns in one process with one thread; times are medians of CPU time.

Shape suffixes: T tokens, D width, F hidden width, O output width, E experts, R rows.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmoe.device import keep_freed_memory
from fedmoe.nn.dispatch import mix_loop
from fedmoe.nn.experts.ffn import FFN
from fedmoe.nn.gates.topk import TopKGate
from fedmoe.nn.init import seeded
from fedmoe.nn.moe import MoE

BUDGET_S = 3.5  # for one case
MOST_TURNS = 100
WARM_UP_TURNS = 3


@dataclass(frozen=True)
class Case:
    dim: int
    hidden: int
    experts: int
    k: int
    tokens: int
    out: int | None = None
    bias: bool = False
    by_default: bool = True

    @property
    def name(self) -> str:
        out = "" if self.out is None else f" out{self.out}"
        return f"d{self.dim} ff{self.hidden}{out} E{self.experts} k{self.k} T{self.tokens}"


CASES = (
    Case(64, 128, 4, 1, 64),
    Case(64, 128, 16, 1, 64),
    Case(64, 128, 64, 1, 64, by_default=False),
    Case(64, 128, 16, 2, 512),
    Case(64, 128, 64, 2, 512),
    Case(64, 128, 64, 2, 4096, by_default=False),
    Case(128, 512, 64, 1, 64, by_default=False),
    Case(128, 512, 16, 2, 512),
    Case(128, 512, 64, 2, 512, by_default=False),
    Case(128, 512, 16, 2, 1024),
    Case(128, 512, 64, 2, 4096, by_default=False),
    Case(256, 1024, 16, 1, 64, by_default=False),
    Case(256, 1024, 16, 2, 512),
    Case(256, 1024, 4, 2, 4096, by_default=False),
    Case(1024, 32, 16, 2, 64, out=10, bias=True),  # the CNN's head in a client's step
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--full", action="store_true", help="all cases, not those within a minute")
    parser.add_argument(
        "--default-allocator",
        action="store_true",
        help="let freed memory go back to the system, which fedmoe's workers do not",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept = not args.default_allocator and keep_freed_memory()

    rows = []
    for case in CASES:
        if args.full or case.by_default:
            times_s = measure(case)
            rows += rows_of(case, times_s)
            over = times_s["ours"] / times_s["floor"], times_s["loop"] / times_s["ours"]
            print(f"{case.name:28} {over[0]:6.2f} x floor, {over[1]:5.2f} x faster than the loop")
    if args.json:
        report = {
            "bench": "layer",
            "machine": f"{platform.machine()} {platform.system()}, 1 thread",
            "allocator": "keeps freed memory" if kept else "default",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "rows": rows,
        }
        print(json.dumps(report))


def rows_of(case: Case, times_s: dict[str, float]) -> list[dict[str, object]]:
    ours = times_s["ours"]
    return [
        {
            "case": case.name,
            "peer": peer,
            "ours": round(ours * 1e6, 1),
            "theirs": round(times_s[peer] * 1e6, 1),
            "unit": "us",
            "ratio": round(times_s[peer] / ours, 3),
            "over_floor": round(ours / times_s["floor"], 3),
        }
        for peer in ("loop", "floor")
    ]


def measure(case: Case) -> dict[str, float]:
    """Median seconds of a step of each, taking turns."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(case.tokens, case.dim, generator=generator).requires_grad_()
    moe = seeded(lambda: layer(case), seed=0)
    grad_TO = torch.randn(case.tokens, case.out or case.dim, generator=generator)
    steps = {
        "floor": floor_step(case, generator),
        "loop": training_step(loop_forward(moe), moe, x_TD, grad_TO),
        "ours": training_step(moe, moe, x_TD, grad_TO),
    }
    for _ in range(WARM_UP_TURNS):
        for step in steps.values():
            step()
    times_s: dict[str, list[float]] = {name: [] for name in steps}
    started_s = time.perf_counter()
    for turn in range(MOST_TURNS):
        if turn > WARM_UP_TURNS and time.perf_counter() - started_s > BUDGET_S:
            break
        for name, step in steps.items():
            before_s = time.thread_time()
            step()
            times_s[name].append(time.thread_time() - before_s)
    return {name: statistics.median(t) for name, t in times_s.items()}


def layer(case: Case) -> MoE:
    experts = {e: FFN(case.dim, case.hidden, case.out, bias=case.bias) for e in range(case.experts)}
    return MoE(TopKGate(case.dim, case.experts, case.k), experts, case.experts)


def loop_forward(moe: MoE) -> Callable[[Tensor], Tensor]:
    """The same layer, its experts mixed as defined."""

    def forward(x_TD: Tensor) -> Tensor:
        held = {int(e): expert for e, expert in moe.experts.items()}
        weight_TE = moe.gate(x_TD, moe.present_E).weight_TE
        return mix_loop(x_TD, weight_TE, held, moe.out_dim or x_TD.shape[1])

    return forward


def training_step(
    forward: Callable[[Tensor], Tensor], moe: MoE, x_TD: Tensor, grad_TO: Tensor
) -> Callable[[], None]:
    leaves = [x_TD, *moe.parameters()]

    def step() -> None:
        forward(x_TD).backward(grad_TO)  # type: ignore[no-untyped-call]
        for leaf in leaves:
            leaf.grad = None

    return step


def floor_step(case: Case, generator: torch.Generator) -> Callable[[], None]:
    rows, out = case.tokens * case.k, case.out or case.dim
    x_RD, gx_RD = torch.randn(rows, case.dim, generator=generator), torch.empty(rows, case.dim)
    h_RF, gh_RF = torch.empty(rows, case.hidden), torch.empty(rows, case.hidden)
    y_RO, gy_RO = torch.empty(rows, out), torch.randn(rows, out, generator=generator)
    up_DF, gup_DF = (torch.randn(case.dim, case.hidden, generator=generator) for _ in range(2))
    down_FO, gdown_FO = (torch.randn(case.hidden, out, generator=generator) for _ in range(2))

    def step() -> None:
        torch.mm(x_RD, up_DF, out=h_RF)
        torch.mm(h_RF, down_FO, out=y_RO)
        torch.mm(h_RF.t(), gy_RO, out=gdown_FO)
        torch.mm(gy_RO, down_FO.t(), out=gh_RF)
        torch.mm(x_RD.t(), gh_RF, out=gup_DF)
        torch.mm(gh_RF, up_DF.t(), out=gx_RD)

    return step


if __name__ == "__main__":
    main()
