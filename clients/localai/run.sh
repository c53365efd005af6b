#!/bin/sh
# LocalAI executes this with --addr HOST:PORT. The interpreter: MULTIGPU_PYTHON, this folder's .venv, python3.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$(readlink -f -- "$0")")" && pwd)
python=${MULTIGPU_PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  if [ -x "$here/.venv/bin/python" ]; then python=$here/.venv/bin/python; fi
fi
exec "$python" "$here/backend.py" "$@"
