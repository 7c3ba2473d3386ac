# Python code for `make demo`: the source of the standard library, by characters.
# Measured on two cores of an AMD EPYC (Zen 5): 2845 steps in one minute, loss on the whole validation split
#   1.292, 1.86 bits per byte. With 10% of the text held out instead of 2%: two cores of an Intel Xeon with
#   AMX (2.6 GHz) 1896 steps, 1.428; two cores of an AMD EPYC (Zen 4) 600 steps, 1.846.
# Peak memory on a CPU, whole process: 422 MiB.

out_dir = "out/python-char"
dataset = "python_char"
time_budget = "60s"
eval_interval = 200
eval_iters = 20
log_interval = 20
sample_interval = 500
snapshot_interval = 100

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 16
gradient_accumulation_steps = 1

learning_rate = 3e-3
min_lr = 0.0
lr_schedule = "wsd"
decay_frac = 0.6
warmup_iters = 50
beta2 = 0.99
