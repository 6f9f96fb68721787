"""What Flower does unless told not to: report usage, look up updates, install what bundles name."""

from __future__ import annotations

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # On networks this small, threads spend their time waiting for each other.
    "OMP_NUM_THREADS": "1",
}
# A service's log holds what somebody must see; a line for each message is none of it.
QUIET_SERVICE = QUIET | {"FLWR_LOG_LEVEL": "WARNING"}
