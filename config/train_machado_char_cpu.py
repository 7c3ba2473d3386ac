# Machado de Assis, tales, by characters, on a CPU: a small GPT-2 with 0.21M parameters.
# Measured on two cores of an Intel Xeon with AMX (2.6 GHz): 5000 steps in 1m07s to 1m10s, with two
#   evaluations; loss on the whole validation split 1.613, 2.26 bits per byte. With --time_budget=90s: 6544
#   steps, 1.575. Tuning, on one thread: learning_rate 3e-3 1.647, 5e-3 1.611, 8e-3 1.621; beta2 0.95 1.620.
# Peak memory on a CPU, whole process: 400 MiB.

out_dir = "out/machado-char-cpu"
dataset = "machado_char"
eval_interval = 2500
eval_iters = 20
log_interval = 100

n_layer = 4
n_head = 4
n_embd = 64
block_size = 32
batch_size = 32
gradient_accumulation_steps = 1

max_iters = 5000
learning_rate = 5e-3
min_lr = 0.0
lr_schedule = "wsd"
decay_frac = 0.6
warmup_iters = 100
beta2 = 0.99
