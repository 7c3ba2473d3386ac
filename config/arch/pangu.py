# PanGu-α (Zeng et al. 2021), with 4 layers. The same settings as jurassic1.py: the original's additional
# query layer on top is left out.
# Use it after any training config: python train.py config/train_eca_char.py config/arch/pangu.py

reset("architecture")

n_layer = 4
n_head = 4
n_embd = 128

bias = True
