"""Answers that must have a form: JSON, a JSON schema, one of several texts, a regular expression."""

# The options that ask for one, by name. Here, where asking takes no time: what makes them takes a while to import
OPTIONS = frozenset(("json_object", "json_schema", "choices", "regex"))
