"""Experiments of `hashml.sparse`."""
