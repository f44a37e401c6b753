"""The conversation a friend sees: templates, transcripts, the prompt. Knows no weights."""
