"""Look inside the writer: each file is a command (python -m lab.curves ...); compute is apart from draw."""
