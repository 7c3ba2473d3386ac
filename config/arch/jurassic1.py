# Jurassic-1 (Lieber et al. 2021), with 4 layers: GPT-3 with an exact GELU.
# Use it after any training config: python train.py config/train_eca_char.py config/arch/jurassic1.py

reset("architecture")

n_layer = 4
n_head = 4
n_embd = 128

bias = True
