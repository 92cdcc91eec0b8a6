"""Programs as Python files that run by themselves."""
