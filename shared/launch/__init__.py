"""The command line: flags, parser, checks, log. No torch."""
