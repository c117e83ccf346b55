"""Training in several processes: collectives, shared gradients and sharded weights."""
