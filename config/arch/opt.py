# OPT (Zhang et al. 2022), four layers of it.
# Any training config takes it: python train.py config/train_eca_char.py config/arch/opt.py

n_layer = 4
n_head = 4
n_embd = 128

norm = "layernorm"
norm_place = "pre"
position = "learned"
activation = "relu"
bias = True
