"""Experiments of `hashml.retrieval`."""
