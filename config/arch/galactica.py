# Galactica (Taylor et al. 2022), four layers of it: no biases anywhere.
# Any training config takes it: python train.py config/train_eca_char.py config/arch/galactica.py

n_layer = 4
n_head = 4
n_embd = 128

norm = "layernorm"
norm_place = "pre"
position = "learned"
activation = "gelu"
bias = False
