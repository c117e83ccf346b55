"""The report of runs: what happened, curves, samples and single tokens, on one page without a server."""
