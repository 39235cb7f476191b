"""Networks assembled from ``stretto.ops``, and the reading of their files."""
