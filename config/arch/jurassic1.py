# Jurassic-1 (Lieber et al. 2021), four layers of it.
# Any training config takes it: python train.py config/train_eca_char.py config/arch/jurassic1.py

n_layer = 4
n_head = 4
n_embd = 128

norm = "layernorm"
norm_place = "pre"
position = "learned"
activation = "gelu"
bias = True
