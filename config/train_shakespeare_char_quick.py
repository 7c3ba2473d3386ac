# Shakespeare by characters in seconds: what nanoGPT's recipe for laptops reaches in 2000 steps, in 300.

out_dir = "out/shakespeare-char-quick"
dataset = "shakespeare_char"
eval_interval = 150
eval_iters = 20
log_interval = 30

n_layer = 2
n_head = 2
n_embd = 128
block_size = 64
batch_size = 16
gradient_accumulation_steps = 1
position = "rope"
activation = "relu2"

max_iters = 300
optimizer = "muon"
learning_rate = 1e-2
muon_learning_rate = 1.5e-2
muon_momentum = 0.9
beta2 = 0.95
weight_decay = 0.0
min_lr = 0.0
lr_schedule = "wsd"
decay_frac = 0.8
warmup_iters = 10
