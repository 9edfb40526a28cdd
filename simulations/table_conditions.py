"""The main methods where conditions change: images a client, devices, absence, skew, 100 clients.

    python -m simulations.table_conditions [--protocols domains-50 ...] [--seeds 0]

Writes simulations/results/conditions.json and, made from it, conditions.md, as runs finish. Runs
live in runs/table and go on where they were stopped. With 1,000 images a client a round takes as
many steps as five with 200, so there are fewer of them.
"""

from fedmoe.experiments.sweep import Setting
from simulations.tables import Table, carry_out, options_of, settings_of

METHODS = ("fedmoe", "fedmoe-published", "random", "fedavg", "local", "fedper", "ifca")
# One client has all images of a domain there, so whoever is ahead of `local` learns from domains
# that contradict its own.
SHARING = ("fedmoe", "fedmoe-norm", "fedavg", "local", "fedper", "fedper-moe", "fedbn", "ifca-norm")
TABLE = Table(
    "conditions",
    "The main methods under other conditions",
    (
        Setting("domains-50", methods=METHODS),
        Setting("domains-1000", 10, methods=METHODS),
        Setting("domains-pooled", methods=SHARING),
        Setting("domains-devices", methods=METHODS),
        Setting("domains-drop-out", methods=METHODS),
        Setting("dirichlet-0.5", methods=METHODS),
        Setting("dirichlet-1.0", methods=METHODS),
        Setting("hundred", methods=METHODS),
    ),
    split=("fedavg",),
)


def main() -> int:
    options = options_of(TABLE, __doc__).parse_args()
    return carry_out(TABLE, settings_of(TABLE, options.protocols), options)


if __name__ == "__main__":
    raise SystemExit(main())
