"""AsyncDiff."""

from shared.parallel.asyncdiff.asyncdiff import AsyncDiff as AsyncDiff
