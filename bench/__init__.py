"""The same model through every backend of this machine, side by side: `pocketlm bench`."""
