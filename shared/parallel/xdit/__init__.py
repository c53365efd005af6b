"""xDiT, through the package xfuser."""
