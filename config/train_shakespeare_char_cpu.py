# Shakespeare by characters on a CPU: the model that nanoGPT's README suggests for laptops, 0.8M parameters.
# Measured on two cores of an Intel Xeon with AMX (2.6 GHz): 2000 steps in 46.9 s, loss on the whole
#   validation split 1.748, 2.52 bits per byte. Tuning: learning_rate 3e-3 1.752, 5e-3 1.753.
# Peak memory on a CPU, whole process: 441 MiB.

out_dir = "out/shakespeare-char-cpu"
dataset = "shakespeare_char"
eval_interval = 500
eval_iters = 50
log_interval = 100

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 12
gradient_accumulation_steps = 1

max_iters = 2000
learning_rate = 3e-3
min_lr = 0.0
lr_schedule = "wsd"
decay_frac = 0.6
warmup_iters = 100
beta2 = 0.99
