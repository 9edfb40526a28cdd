"""What a run will cost, before it starts: for each client, and for each method as a whole."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.table import Table
from rich.text import Text

from fedmoe.cli.making import check, device_of, methods_of, rounds_of
from fedmoe.cli.words import (
    console,
    duration,
    listed,
    nothing_on_stdout,
    plain_table,
    plural,
    size,
    write_json,
)
from fedmoe.experiments.experiment import Experiment
from fedmoe.experiments.planning import ClientPlan, plan_clients
from fedmoe.experiments.run import layer_sizes_of
from fedmoe.experiments.table import pick_method

FEW_NUMBERS = 8  # clients that are listed by number on one line


@dataclass(frozen=True)
class Total:
    """A whole run, the closing evaluation included, all clients after one another."""

    method: str
    control: bool
    bytes: int  # before messages are coded
    coded: bool
    seconds: float
    memory_bytes: int  # the most that a client needs at its peak
    over_budget: int  # clients whose parameters do not fit their device


def plan_command(
    name: str, method: str | None, seed: int, rounds: int | None, device: str | None, json: bool
) -> None:
    """Raises CommandError: the experiment cannot be made, or a client's budget is too small."""
    with nothing_on_stdout(json):
        where = device_of(device)
        rounds = rounds_of(name, rounds)
        methods = methods_of(name, seed, rounds)
        chosen = pick_method(methods, method or next(iter(methods)), name)
        shown = methods if method is None else {method: chosen}
        for experiment in shown.values():
            check(experiment)
        plans = {m: plan_clients(e, where) for m, e in shown.items()}
    totals = [total(methods[m], own) for m, own in plans.items()]
    own = plans[chosen.method]
    if json:
        write_json(
            {
                "experiment": chosen.name,
                "method": chosen.method,
                "seed": seed,
                "rounds": rounds,
                "device": where,
                "num_experts_L": list(layer_sizes_of(chosen)),
                "clients": [asdict(p) for p in own],
                "totals": [asdict(t) for t in totals],
            }
        )
        return
    out = console()
    out.print()
    out.print(Text(f"{chosen.name}, {chosen.method}: each client, each round", "bold"))
    out.print(_client_table(chosen, own))
    out.print()
    title = f"A whole run of {plural(rounds, 'round')}, clients after one another on {where}"
    out.print(Text(title, "bold"))
    out.print(_total_table(totals))
    out.print()
    for text in _notes(chosen, totals):
        out.print(Text(f"· {text}", "dim"))


def total(experiment: Experiment, plans: Sequence[ClientPlan]) -> Total:
    """What its clients add up to over a run."""
    schedule = experiment.schedule
    drawn = schedule.clients_per_round or sum(count for _, count in schedule.quotas)
    share = (drawn or len(plans)) / len(plans)
    down, up = (sum(getattr(p, f"bytes_{way}") for p in plans) for way in ("down", "up"))
    seconds = sum(p.seconds for p in plans)
    closing = min(schedule.evaluate_clients or len(plans), len(plans)) / len(plans)
    return Total(
        method=experiment.method,
        control=experiment.control,
        coded=experiment.coded,
        # The closing evaluation sends a client its part, has it train, and hears only numbers.
        bytes=round(schedule.rounds * share * (down + up) + closing * down),
        seconds=(schedule.rounds * share + closing) * seconds,
        memory_bytes=max(p.training_bytes for p in plans),
        over_budget=sum(_over(p) for p in plans),
    )


def _over(plan: ClientPlan) -> bool:
    return plan.memory_bytes is not None and plan.parameter_bytes > plan.memory_bytes


def _client_table(experiment: Experiment, plans: Sequence[ClientPlan]) -> Table:
    sizes = layer_sizes_of(experiment)
    table = plain_table(1)
    grouped = any(p.group is not None for p in plans)
    table.add_column("clients", min_width=len("clients"))  # the one that may wrap
    if grouped:
        table.add_column("group", no_wrap=True)
    for head in ("budget", "fits", "holds", "params", "peak", "down", "up", "time"):
        table.add_column(head, justify="right", no_wrap=True)
    for p, numbers in _alike(plans):
        table.add_row(
            _numbers(numbers),
            *([p.group or "-"] if grouped else []),
            "none" if p.memory_bytes is None else size(p.memory_bytes),
            str(p.experts_per_layer * len(sizes)),
            f"{p.experts_held}/{sum(sizes)}",
            Text(size(p.parameter_bytes), "yellow" if _over(p) else ""),
            size(p.training_bytes),
            size(p.bytes_down),
            size(p.bytes_up),
            duration(p.seconds),
        )
    return table


def _alike(plans: Sequence[ClientPlan]) -> list[tuple[ClientPlan, list[int]]]:
    """Clients that need the same, told once with all their numbers."""
    alike: dict[tuple[object, ...], tuple[ClientPlan, list[int]]] = {}
    for p in plans:
        key = (p.group, p.memory_bytes, p.experts_held, p.bytes_down, f"{p.seconds:.2g}")
        alike.setdefault(key, (p, []))[1].append(p.client)
    return list(alike.values())


def _numbers(clients: Sequence[int]) -> str:
    if len(clients) <= FEW_NUMBERS:
        return " ".join(map(str, clients))
    return f"{len(clients)} from {clients[0]} to {clients[-1]}"


def _total_table(totals: Sequence[Total]) -> Table:
    table = plain_table()
    table.add_column("method", no_wrap=True, style="bold")
    for head in ("traffic", "about", "peak of a client", "over budget"):
        table.add_column(head, justify="right", no_wrap=True)
    for t in totals:
        over = Text(
            plural(t.over_budget, "client") if t.over_budget else "none",
            "yellow" if t.over_budget else "",
        )
        name = t.method + (" (control)" if t.control else "")
        table.add_row(name, size(t.bytes), duration(t.seconds), size(t.memory_bytes), over)
    return table


def _notes(experiment: Experiment, totals: Sequence[Total]) -> list[str]:
    notes = [
        "fits: experts that the budget for parameters holds; peak: measured while one batch "
        "trains, gradients and activations included; time: from a few batches on this machine.",
        "Where experts are chosen on the way, every client is taken to fill its budget, and "
        "rounds of exploring to be like the others.",
    ]
    if any(t.over_budget for t in totals):
        notes.append("A method over budget gives clients more than their devices hold.")
    if coded := [t.method for t in totals if t.coded]:
        notes.append(f"Messages of {listed(coded)} are coded, which takes less than what is told.")
    return notes
