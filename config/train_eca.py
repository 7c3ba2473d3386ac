# Eça de Queiroz, 21 works, with a byte-level BPE of 4,096 tokens trained on them: 12.3M parameters.
# For a GPU; the whole run has not been measured yet. Measured on two cores of an Intel Xeon with AMX (2.6
#   GHz): 4 s per step; the first 23 steps (--time_budget=120s --warmup_iters=10 --eval_iters=2) reach a loss
#   of 6.806 on the whole validation split, 2.97 bits per byte.
# Peak memory on a CPU, whole process: 1.5 GiB.

out_dir = "out/eca"
dataset = "eca"
eval_interval = 250
eval_iters = 20
log_interval = 10
sample_interval = 250

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
batch_size = 32
gradient_accumulation_steps = 1
dropout = 0.2

max_iters = 2000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99
