"""The model that comes with the package, as a file beside this one: small-talk.gguf."""
