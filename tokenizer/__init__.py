"""Tokenizers: text to ids and back. Knows no model."""

from pocketlm.tokenizer.base import NoTokenizer, StreamDecoder, Tokenizer
from pocketlm.tokenizer.gguf_vocabulary_reader import from_metadata
from pocketlm.tokenizer.gguf_vocabulary_writer import normalizer_keys, to_metadata
from pocketlm.tokenizer.readers import load, to_json

__all__ = ["NoTokenizer", "StreamDecoder", "Tokenizer", "from_metadata", "load", "normalizer_keys", "to_json", "to_metadata"]
