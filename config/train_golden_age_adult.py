# A Story of the Golden Age (James Baldwin), by characters; the largest of three models: 1.2M parameters.
# Measured on two cores of an AMD EPYC (Zen 5): loss on the whole validation split 1.491, 2.14 bits per byte.
#   2000 steps took 6m19s on two cores of an Intel Xeon with AMX (2.6 GHz). In as many steps the smaller
#   models do better.
# Peak memory on a CPU, whole process: 515 MiB.

out_dir = "out/golden-age-adult"
dataset = "golden_age_char"
eval_interval = 200
eval_iters = 50
log_interval = 100

n_layer = 6
n_head = 4
n_embd = 128
block_size = 64
batch_size = 32
gradient_accumulation_steps = 1
dropout = 0.2

max_iters = 2000
learning_rate = 3e-3
min_lr = 0.0
lr_schedule = "wsd"
decay_frac = 0.6
warmup_iters = 100
beta2 = 0.99
