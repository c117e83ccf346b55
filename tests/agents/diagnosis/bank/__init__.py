"""The bank of faults: tiny runs with one fault each, and healthy ones, for the diagnosis."""
