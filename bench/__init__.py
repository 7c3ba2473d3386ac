"""Speed: each file a command that prints a table and one last JSON line."""
