"""A Trace in, numbers out."""
