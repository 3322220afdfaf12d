"""Programs that run artifacts: one file, one runtime."""
