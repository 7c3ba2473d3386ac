# Machado de Assis, tales, by characters, on a CPU: a plain GPT-2 shape of 0.21M parameters.
# Measured on two cores of an AMD EPYC (Zen 4, 2.6 GHz, no AMX): 5000 steps in 2m11s, evaluated every
#   1000, whole-validation loss 1.615, 2.26 bits per byte. With --time_budget=90s: 3276 to 3914 steps,
#   1.655 to 1.687. Swept on one thread: learning_rate 3e-3 1.647, 5e-3 1.611, 8e-3 1.621; beta2 0.95 1.620.

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
