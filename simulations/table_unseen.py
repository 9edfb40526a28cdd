"""The table of clients who come when the training is over: FedJETs and what it must beat.

    python -m simulations.table_unseen [--protocols heldout-weak ...] [--methods fedjets ...]

Writes simulations/results/unseen.json and, made from it, unseen.md, as runs finish: a weak and an
average encoder, and FedJETs with one thing changed at a time. unseen-experts.json has what every
expert of FedJETs can do on each label, told from the last checkpoint of each of its runs. Runs live
in runs/table and go on where they were stopped.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedmoe.checkpoint import newest_checkpoint
from fedmoe.experiments.sweep import Job, Plan, Setting, finished_row, plan_sweep
from fedmoe.experiments.table import make_experiment
from fedmoe.experiments.unseen import specialisation
from fedmoe.federated.fedjets import FedJETsState
from fedmoe.report.atomic import write_atomically
from fedmoe.report.measures import Row
from fedmoe.report.unseen import unseen_markdown
from simulations.tables import RESULTS, Table, carry_out, options_of, settings_of

HOW_TO_READ = """\
Each client who came afterwards was served once, from unlabelled data, without a step of training:
accuracies are those of the model as it came, on the client's own test part, which has four of the
ten labels; *all labels* is the same model on images of all ten, for which it was not chosen. ± is
the standard deviation over seeds, Std that over the clients. *Each* counts both ways and the
encoder, *training* the whole run with the closing evaluation. Methods marked ‡ are controls.
Differences in bold have a 95 % interval over seeds without 0."""

TABLE = Table(
    "unseen",
    "Clients who come when the training is over",
    (
        Setting("heldout-weak"),
        Setting("heldout-average"),
        Setting("heldout-ablations"),
    ),
    reference="fedjets-fitted",
    how_to_read=HOW_TO_READ,
    sections=unseen_markdown,
)
METHOD = "fedjets"  # whose experts are told apart
EXPERTS = "unseen-experts.json"


def write_experts(plan: Plan, place: Path = RESULTS) -> None:
    """What the experts of every finished run can do.

    Runs that are not here, and those that the plan does not ask for, stay as they were told.
    """
    path = place / EXPERTS
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    told = {row["definition"]: row for row in known}
    jobs = [job for job in plan.jobs if job.spec.method == METHOD]
    asked = {(job.protocol, job.spec.seed) for job in jobs}
    rows = [row for row in known if (row["protocol"], row["seed"]) not in asked]
    rows += [row for job in jobs if (row := _experts_of(job, told)) is not None]
    order = {s.protocol: i for i, s in enumerate(TABLE.settings)}
    rows.sort(key=lambda row: (order.get(row["protocol"], len(order)), row["seed"]))
    write_atomically(path, json.dumps(rows, indent=1) + "\n")


def _experts_of(job: Job, told: Mapping[str, Row]) -> Row | None:
    if job.definition.hash in told:
        return told[job.definition.hash]
    if not job.folder.exists() or finished_row(job) is None:
        return None
    found = newest_checkpoint(job.folder / "checkpoints", FedJETsState)
    if found is None:
        return None
    ours = specialisation(make_experiment(job.spec), found[1].model)
    return {
        "protocol": job.protocol,
        "method": job.spec.method,
        "seed": job.spec.seed,
        "definition": job.definition.hash,
        **_rounded(asdict(ours)),
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {name: _rounded(v) for name, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, Sequence) else value


def main() -> int:
    options = options_of(TABLE, __doc__).parse_args()
    settings = settings_of(TABLE, options.protocols)
    code = carry_out(TABLE, settings, options)
    if code < 2:
        write_experts(plan_sweep(settings, options.seeds, options.runs))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
