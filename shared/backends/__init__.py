"""The backends: each with its types, flags, refusals and checks, and how it makes a pipeline parallel.

Imports no torch.
"""

from __future__ import annotations

from shared.backends import asyncdiff, distrifuser, xdit
from shared.launch.backend import Backend

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (asyncdiff.BACKEND, distrifuser.BACKEND, xdit.BACKEND)
}
