"""Training: its steps, and what keeps a run alive, resumable and visible."""
