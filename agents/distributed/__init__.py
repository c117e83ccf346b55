"""Training in several processes: how they meet, agree, and share weights and gradients."""
