# Machado de Assis, tales, by characters, on a CPU, with the components of current small models: 0.21M
# parameters and the same number of tokens as train_machado_char_cpu.py.
# Measured on two cores of an Intel Xeon with AMX (2.6 GHz): 5000 steps in 4m10s, loss on the whole validation
#   split 1.497, 2.09 bits per byte (train_machado_char_cpu.py: 1.613, in 1m07s). Changes that led there, each
#   on one thread: muon_learning_rate 2e-2 1.558, 1e-2 1.536, 5e-3 1.522, 3e-3 1.522; no weight decay 1.515;
#   SwiGLU instead of ReLU² 1.511; q, k and v as separate matrices in Muon 1.508; eight heads 1.496 (two:
#   1.536). Changes with little or no gain over 1.522: untied weights 1.521, muon_momentum 0.9 1.521,
#   learning_rate 1e-2 1.523, decay_frac 0.8 1.518 (with the other changes 1.514, without it 1.511).
# Peak memory on a CPU, whole process: 404 MiB.

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
