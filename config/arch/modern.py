# What small models are made of today (nanochat, Karpathy 2025; Qwen3, Yang et al. 2025).
# Try it with optimizer = "muon".
# Any training config takes it: python train.py config/train_eca_char.py config/arch/modern.py

n_layer = 4
n_head = 4
n_embd = 128

norm = "rmsnorm"
norm_place = "pre"
qk_norm = True
position = "rope"
activation = "relu2"
bias = False

# what it does not have, in case the training config does
n_kv_head = 0
n_inner = 0
embd_norm = False
rope_theta = 10000.0
parallel_block = False
prefix_len = 0
sliding_window = 0
tie_weights = True
logit_softcap = 0.0
