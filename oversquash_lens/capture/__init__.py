"""A hooked model and a prompt in, a Trace out; the only folder that knows hook names and model classes."""
