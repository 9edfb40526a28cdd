"""The table of FedMoE and its comparators on Fashion-MNIST, several seeds.

    python -m simulations.table_fashion [--protocols domains ...] [--seeds 0 1 2] [--workers 2]

Writes simulations/results/fashion.json and, made from it, fashion.md: a row per protocol, method
and seed, as runs finish. Runs live in runs/fashion and go on where they were stopped; what is
finished is not run again.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from fedmoe.experiments.run import Spec
from fedmoe.experiments.study import RunProgress, folder_of, is_finished, run_study, usable_cores
from fedmoe.experiments.table import default_rounds, find_experiment
from fedmoe.report.log import Run, read_run
from fedmoe.report.measures import result_row
from fedmoe.report.paired import paired_over_seeds
from fedmoe.report.tables import markdown_table

RESULTS = Path(__file__).parent / "results"
PROTOCOLS = ("domains", "published-fifth-dirichlet", "published-fifth-pathological")
SEEDS = (0, 1, 2)


def jobs_of(
    protocols: Sequence[str], seeds: Sequence[int], root: Path, methods: Sequence[str] = ()
) -> list[tuple[Spec, Path]]:
    """Every run of the table, all methods of a seed together."""
    jobs = []
    for protocol in protocols:
        rounds = default_rounds(protocol)
        for seed in seeds:
            for method in methods or find_experiment(protocol)(seed=seed):
                spec = Spec(protocol, method, seed, rounds)
                jobs.append((spec, folder_of(root / protocol, spec)))
    return jobs


def write_results(jobs: Sequence[tuple[Spec, Path]], place: Path = RESULTS) -> None:
    """fashion.json and fashion.md from the logs of the runs that are finished."""
    finished = [(s.target, read_run(folder)) for s, folder in jobs if is_finished(folder)]
    rows = [result_row(run, protocol) for protocol, run in finished]
    place.mkdir(parents=True, exist_ok=True)
    (place / "fashion.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    parts = [
        "# FedMoE and its comparators on Fashion-MNIST\n",
        "Made by `python -m simulations.table_fashion` from the logs of its runs. Accuracies are "
        "means over clients on their own test parts, of the model as received or after local "
        "training, whichever is better on the client's validation part; spread is the standard "
        "deviation over seeds. Bytes are those of the whole run over all clients, both ways, "
        "exploration and the closing evaluation included.\n",
    ]
    for protocol in dict.fromkeys(p for p, _ in finished):
        own = [row for row in rows if row["protocol"] == protocol]
        parts += [f"\n## {protocol}\n", markdown_table(own), ""]
        parts += _differences([run for p, run in finished if p == protocol])
    (place / "fashion.md").write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")


def _differences(runs: Sequence[Run]) -> list[str]:
    """FedMoE less each other method, paired by seed."""
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.info.method, []).append(run)
    own = by_method.get("fedmoe", [])
    lines = []
    for method, others in by_method.items():
        seeds = {r.info.seed for r in own} & {r.info.seed for r in others}
        if method == "fedmoe" or len(seeds) < 2:
            continue
        d = paired_over_seeds(
            [r for r in own if r.info.seed in seeds], [r for r in others if r.info.seed in seeds]
        )
        assert d.low is not None and d.high is not None  # from two pairs on there is an interval
        lines.append(
            f"- fedmoe less {method}: {100 * d.mean:+.2f} points "
            f"(95 % interval {100 * d.low:+.2f} to {100 * d.high:+.2f}, {d.num_pairs} seeds)"
        )
    return ["Paired by seed:\n", *lines, ""] if lines else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--protocols", nargs="+", default=list(PROTOCOLS))
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--runs", type=Path, default=Path("runs/fashion"))
    parser.add_argument("--workers", type=int, default=min(2, usable_cores()))
    options = parser.parse_args()
    jobs = jobs_of(options.protocols, options.seeds, options.runs, options.methods)
    # What earlier calls have finished stays in the table, whatever this call was asked for.
    table = jobs_of(PROTOCOLS, SEEDS, options.runs)
    done: set[Path] = set()

    def watch(progress: list[RunProgress]) -> None:
        new = {p.folder for p in progress if p.done} - done
        if new:
            done.update(new)
            write_results(table)
        for p in progress:
            if p.folder in new:
                print(f"done {p.folder} accuracy as received {p.accuracy or 0:.4f}", flush=True)

    end = run_study(jobs, options.workers, watch=watch, every_s=15.0)
    write_results(table)
    failed = [p for p in end if p.error]
    for p in failed:
        print(f"failed {p.folder}: {p.error}")
    print((RESULTS / "fashion.md").read_text(encoding="utf-8"))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
