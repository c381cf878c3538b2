"""Pallas kernels of hashml, one folder an op, and the hash arithmetic they share (`bits`)."""
