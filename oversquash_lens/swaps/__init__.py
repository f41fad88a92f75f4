"""What moves when a token is really another one: substitution, swaps, activation patching."""
