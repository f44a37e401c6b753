"""One executable a friend opens: the stub (a frozen chat program), and what is put behind it."""
