# A Story of the Golden Age (James Baldwin), by characters; the second of three models: 0.8M parameters.
# Measured on two cores of an AMD EPYC (Zen 5): loss on the whole validation split 1.368, 1.96 bits per byte.
#   2000 steps took 1m32s on two cores of an Intel Xeon with AMX (2.6 GHz).
# Peak memory on a CPU, whole process: 457 MiB.

out_dir = "out/golden-age-teen"
dataset = "golden_age_char"
eval_interval = 200
eval_iters = 50
log_interval = 100

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 32
gradient_accumulation_steps = 1

max_iters = 2000
learning_rate = 3e-3
min_lr = 0.0
lr_schedule = "wsd"
decay_frac = 0.6
warmup_iters = 100
beta2 = 0.99
