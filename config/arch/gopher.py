# Gopher (Rae et al. 2021), four layers of it. Its relative positions are T5's here, one bias a distance;
# the original has those of Transformer-XL.
# Any training config takes it: python train.py config/train_eca_char.py config/arch/gopher.py

n_layer = 4
n_head = 4
n_embd = 128

norm = "rmsnorm"
norm_place = "pre"
position = "relative"
activation = "gelu"
bias = True
