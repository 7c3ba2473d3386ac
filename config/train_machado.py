# Machado de Assis, tales, in GPT-2's tokens: two thirds of the parameters belong to the vocabulary of 50,257.
# For a GPU; the whole run has not been measured yet. Measured on two cores of an Intel Xeon with AMX (2.6
#   GHz): the first 58 steps (--time_budget=120s --warmup_iters=20 --eval_iters=2) reach a loss of 5.881 on
#   the whole validation split, 3.38 bits per byte. With a warm-up much shorter than 100 steps (seen with 20)
#   the loss may jump when the learning rate reaches its peak.
# Peak memory on a CPU, whole process: 1.4 GiB.

out_dir = "out/machado"
dataset = "machado"
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
