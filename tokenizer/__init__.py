"""Tokenizers: text to ids and back. Knows no model."""
