"""Experiments of `hashml.weights`."""
