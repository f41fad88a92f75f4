"""The same measures over many prompts, a row each."""
