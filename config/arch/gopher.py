# Gopher (Rae et al. 2021), with 4 layers. Relative positions are T5's (a learned bias per bucket of
# distances); the original uses those of Transformer-XL.
# Use it after any training config: python train.py config/train_eca_char.py config/arch/gopher.py

reset("architecture")

n_layer = 4
n_head = 4
n_embd = 128

norm = "rmsnorm"
position = "relative"
bias = True
