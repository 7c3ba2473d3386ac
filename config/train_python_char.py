# Python code for `make demo`: the source of the standard library, by characters. Model, batch size and
# schedule are chosen for this machine, as in config/auto.py.
# Measured on two cores of an AMD EPYC (Zen 5) in one minute, loss on the whole validation split: 1.077 (1.55
#   bits per byte) with bfloat16, 2641 steps of a model of 2 layers; 1.084 (1.56) held to AVX2, 2760 steps of
#   1 layer. Until November 2026, with 4 layers without n-grams and AdamW: 1.292.
# The run folder takes 200 MB: most of the parameters are in the tables of n-grams.

auto = True
out_dir = "out/python-char"
dataset = "python_char"
time_budget = "60s"
slow_time_budget = "3m"
sample_interval = 500
snapshot_interval = 100
