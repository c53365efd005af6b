"""Host for AsyncDiff: asynchronous model parallelism. Start it under torchrun, one rank a GPU."""

from shared.backends import BACKENDS
from shared.host import serve

if __name__ == "__main__":
    serve(BACKENDS["asyncdiff"])
