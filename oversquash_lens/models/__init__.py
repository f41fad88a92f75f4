"""A name, a folder or a file in, a hooked model out."""
