"""Several measures held against one another on one prompt."""
