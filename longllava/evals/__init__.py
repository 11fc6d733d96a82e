"""Evaluations. A task sees only what a model answers and how it scores, so that any model can be judged."""
