"""Measuring: `stretto bench decode`, `stretto bench ops`, and the ceilings that `stretto doctor` reports."""
