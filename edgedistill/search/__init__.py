"""``edgedistill search``: which remedy makes the smallest artifacts that still pass a recipe."""
