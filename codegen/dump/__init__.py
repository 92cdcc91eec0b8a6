"""Dumps: what a recipe did to a model, as files that people read."""
