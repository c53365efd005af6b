"""A diffusers pipeline on one rank: loading it, and running it for a request."""
