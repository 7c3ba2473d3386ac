# Machado de Assis, tales, by characters, on a CPU, with the parts that small models have today: 0.21M
# parameters, as train_machado_char_cpu.py, and the same number of tokens.

out_dir = "out/machado-char-cpu-modern"
dataset = "machado_char"
eval_interval = 2500
eval_iters = 20
log_interval = 100

n_layer = 4
n_head = 8
n_embd = 64
block_size = 32
batch_size = 32
gradient_accumulation_steps = 1
norm = "rmsnorm"
qk_norm = True
position = "rope"
activation = "swiglu"

max_iters = 5000
optimizer = "muon"
learning_rate = 5e-3
muon_learning_rate = 5e-3
weight_decay = 0.0
min_lr = 0.0
lr_schedule = "wsd"
decay_frac = 0.6
warmup_iters = 100
beta2 = 0.99
