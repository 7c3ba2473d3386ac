# Shakespeare (tinyshakespeare) by characters, as in nanoGPT's example: 10.7M parameters.
# For a GPU; the whole run has not been measured yet. Measured on two cores of an Intel Xeon with AMX (2.6
#   GHz): the first 17 steps (--time_budget=150s --warmup_iters=10 --eval_iters=2) reach a loss of 2.712 on
#   the whole validation split, 3.91 bits per byte.
# Peak memory on a CPU, whole process: 1.4 GiB.

out_dir = "out/shakespeare-char"
dataset = "shakespeare_char"
eval_interval = 250
eval_iters = 20
log_interval = 10

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
batch_size = 64
gradient_accumulation_steps = 1
dropout = 0.2

max_iters = 5000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99
