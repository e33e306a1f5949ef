"""Configuration: what can be set, where it is read from, and other ways to spell it."""
