"""The HTML report of a chain of stages: one file that holds everything that it shows."""
