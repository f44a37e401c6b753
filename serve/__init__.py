"""A model behind an address: OpenAI's protocol for programs, one page for a person."""
