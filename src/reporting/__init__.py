"""One file that shows a run and its results."""
