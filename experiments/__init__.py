"""A runnable experiment behind every claim: ``python -m experiments list | run | sweep | report``."""
