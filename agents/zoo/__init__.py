"""rl_zoo3 as a client of textenv."""
