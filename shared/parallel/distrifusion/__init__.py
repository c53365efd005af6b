"""DistriFusion."""

from shared.parallel.distrifusion.distrifusion import DistriFusion as DistriFusion
