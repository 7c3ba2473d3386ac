# Machado de Assis, tales, by characters: 10.7M parameters.
# For a GPU; the whole run has not been measured yet. Measured on two cores of an Intel Xeon with AMX (2.6
#   GHz): the first 168 steps (--time_budget=90s --warmup_iters=20) reach a loss of 2.267 on the whole
#   validation split, 3.17 bits per byte.
# Peak memory on a CPU, whole process: 866 MiB.

out_dir = "out/machado-char"
dataset = "machado_char"
eval_interval = 250
eval_iters = 50
log_interval = 10

n_layer = 6
n_head = 6
n_embd = 384
block_size = 64
batch_size = 32
gradient_accumulation_steps = 1
dropout = 0.1

max_iters = 5000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99
