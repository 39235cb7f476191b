"""Continuous batching over one captured model step."""
