"""Where a hospital's records come from."""
