"""Host for DistriFusion: displaced patch parallelism. Not built yet."""

from __future__ import annotations

from shared.config import UsageError, exit_usage, parse_or_exit

if __name__ == "__main__":
    config = parse_or_exit("distrifuser")
    exit_usage(config.backend, UsageError("this host is not built yet; asyncdiff_host.py is"))
