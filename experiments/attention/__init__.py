"""Attention by hashing."""
