"""Tasks: data, environment and evaluation of one benchmark each. Importing this package imports nothing."""
