# What small models use today (nanochat, Karpathy 2025; Qwen3, Yang et al. 2025), with 4 layers.
# Works well with --optimizer=muon.
# Use it after any training config: python train.py config/train_eca_char.py config/arch/modern.py

reset("architecture")

n_layer = 4
n_head = 4
n_embd = 128

norm = "rmsnorm"
qk_norm = True
position = "rope"
activation = "relu2"
