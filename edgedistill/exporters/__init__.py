"""Artifact writers: one file, one format; the file name is the name in a recipe."""
