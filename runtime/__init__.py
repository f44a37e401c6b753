"""From a model file to logits to tokens. Knows nothing about text or chat."""
