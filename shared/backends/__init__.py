"""The three backends: their types, refusals, checks, and how each takes hold of a pipeline."""
