"""What machine this is, which models fit on it, and what to change."""
