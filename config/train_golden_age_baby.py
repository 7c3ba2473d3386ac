# A Story of the Golden Age (James Baldwin), by characters; the smallest of three models: 0.2M parameters.
# Measured on two cores of an AMD EPYC (Zen 5): loss on the whole validation split 1.434, 2.06 bits per byte.
#   2000 steps took 1m08s on two cores of an Intel Xeon with AMX (2.6 GHz). Tuning, with the end of the book
#   as the validation split: learning_rate 5e-3 1.974, 8e-3 1.910.
# Peak memory on a CPU, whole process: 404 MiB.

out_dir = "out/golden-age-baby"
dataset = "golden_age_char"
eval_interval = 200
eval_iters = 50
log_interval = 100

n_layer = 4
n_head = 4
n_embd = 64
block_size = 64
batch_size = 32
gradient_accumulation_steps = 1

max_iters = 2000
learning_rate = 8e-3
min_lr = 0.0
lr_schedule = "wsd"
decay_frac = 0.6
warmup_iters = 100
beta2 = 0.99
