"""Many prompts from a file, answered by one machine or by several."""
