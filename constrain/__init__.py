"""Answers that must have a form: JSON, a JSON schema, one of several texts, a regular expression."""
