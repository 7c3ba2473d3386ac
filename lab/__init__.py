"""Commands that look inside a model or a run (python -m lab.curves ...): compute arrays, then draw them."""
