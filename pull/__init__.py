"""Fetching models: a table of good small ones, and a download that is checked."""
