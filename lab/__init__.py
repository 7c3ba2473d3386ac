"""Commands that look inside a model or a run (python -m lab.curves ...): each computes arrays, then draws them."""
