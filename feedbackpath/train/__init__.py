"""Training: the settings, the one loop, and what is kept on disk."""
