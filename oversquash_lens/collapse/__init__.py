"""Representational collapse: families of prompt pairs, their curves, number formats and the paper's lemmas."""
