# Galactica (Taylor et al. 2022), with 4 layers: learned positions, GELU and no biases, which are the
# defaults.
# Use it after any training config: python train.py config/train_eca_char.py config/arch/galactica.py

reset("architecture")

n_layer = 4
n_head = 4
n_embd = 128
