"""Compression steps: one file, one stage; the file name is the name in a recipe."""
