"""The table of FedMoE and its comparators on Fashion-MNIST, several seeds.

    python -m simulations.table_fashion [--protocols domains ...] [--seeds 0 1 2] [--workers 2]

Writes simulations/results/fashion.json and, made from it, fashion.md: a row per protocol, method
and seed, as runs finish. Runs live in runs/table and go on where they were stopped; what is
finished is not run again, nor what fashion.json has a row of made under the same settings.
"""

from fedmoe.experiments.sweep import Setting
from simulations.tables import Table, carry_out, options_of, settings_of

PROTOCOLS = ("domains", "published-fifth-dirichlet", "published-fifth-pathological")
METHODS = ("fedmoe", "random", "fedavg", "fedprox", "local")
CONTROLS = ("chosen-by-group", "fedavg-per-group")  # where groups are known
TABLE = Table(
    "fashion",
    "FedMoE and its comparators on Fashion-MNIST",
    tuple(Setting(name) for name in PROTOCOLS),
    METHODS + CONTROLS,
)


def main() -> int:
    options = options_of(TABLE, __doc__).parse_args()
    return carry_out(TABLE, settings_of(TABLE, options.protocols), options)


if __name__ == "__main__":
    raise SystemExit(main())
