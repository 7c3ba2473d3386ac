# Python code for `make demo`: the source of the standard library, by characters. Model, batch size and
# schedule are chosen for this machine, as in config/auto.py.
# Measured with config/auto.py in one minute on two cores of an AMD EPYC (Zen 5) held to AVX2, loss on the
#   whole validation split: 1.063 (1.53 bits per byte), 2817 steps of a model of 1 layer. Until November 2026,
#   with 4 layers without n-grams and AdamW: 1.292.
# The run folder takes 200 MB: most of the parameters are in the tables of n-grams.

auto = True
out_dir = "out/python-char"
dataset = "python_char"
time_budget = "60s"
slow_time_budget = "3m"
sample_interval = 500
snapshot_interval = 100
