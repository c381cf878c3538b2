"""Training over devices that differ: what the papers claim, measured."""
