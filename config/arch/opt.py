# OPT (Zhang et al. 2022), with 4 layers.
# Use it after any training config: python train.py config/train_eca_char.py config/arch/opt.py

reset("architecture")

n_layer = 4
n_head = 4
n_embd = 128

activation = "relu"
bias = True
