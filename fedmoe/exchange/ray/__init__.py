"""The exchange over Ray: actors that stay do the work of many clients, on one machine or several.

Without actors nothing of fedmoe's needs Ray, so it is imported here, and where it is missing said.
"""

import os

# No news to anybody, and no word on GPUs that nobody asked for: before Ray is imported.
for _name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
    os.environ.setdefault(_name, "0")

try:
    import ray  # noqa: F401
except ImportError as _why:
    raise ImportError(
        "clients can be shared out over actors only where Ray is installed: pip install "
        "'flwr[simulation]' brings it, for Python below 3.14; without actors nothing needs it"
    ) from _why
