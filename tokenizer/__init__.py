"""Tokenizers: text to ids and back. Knows no model."""

from pocketlm.tokenizer.base import NoTokenizer, StreamDecoder, Tokenizer
from pocketlm.tokenizer.gguf_vocabulary_reader import from_metadata
from pocketlm.tokenizer.gguf_vocabulary_writer import to_metadata
from pocketlm.tokenizer.readers import load

__all__ = ["NoTokenizer", "StreamDecoder", "Tokenizer", "from_metadata", "load", "to_metadata"]
