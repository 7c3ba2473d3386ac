# PanGu-α (Zeng et al. 2021), four layers of it, without the query layer that the original has on top.
# Any training config takes it: python train.py config/train_eca_char.py config/arch/pangu.py

n_layer = 4
n_head = 4
n_embd = 128

norm = "layernorm"
norm_place = "pre"
position = "learned"
activation = "gelu"
bias = True
