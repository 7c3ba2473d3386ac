# A Story of the Golden Age (James Baldwin), by characters; the third of three sizes: 1.2M parameters.
# Measured on two cores of an AMD EPYC (Zen 4, 2.6 GHz, no AMX): the whole run was not measured yet; the
#   first 414 steps (--time_budget=90s --warmup_iters=20) reach a whole-validation loss of 2.448, 3.51
#   bits per byte.

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
