# A writer of Python for `make demo`: characters of the standard library's own source.
# Costs: a minute on two CPU cores, whatever they are (the schedule follows the clock).

out_dir = "out/python-char"
dataset = "python_char"
time_budget = "60s"
eval_interval = 200
eval_iters = 20
log_interval = 20
sample_interval = 500

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 16
gradient_accumulation_steps = 1

learning_rate = 3e-3
min_lr = 0.0
lr_schedule = "wsd"
decay_frac = 0.6
warmup_iters = 50
beta2 = 0.99
