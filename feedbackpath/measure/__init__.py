"""How well feedback weights agree with forward weights."""
