# Python code for `make demo`: the source of the standard library, by characters. Model, batch size and
# schedule are chosen for this machine, as in config/auto.py.
# FIGURES

auto = True
out_dir = "out/python-char"
dataset = "python_char"
time_budget = "60s"
slow_time_budget = "3m"
sample_interval = 500
snapshot_interval = 100
