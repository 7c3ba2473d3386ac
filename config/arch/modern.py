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
