"""Dump: what a recipe did to a model, as files for people: a few for every pass, and one page."""
