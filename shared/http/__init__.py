"""The HTTP server on rank 0: routes, clients' APIs, the page. No torch."""
