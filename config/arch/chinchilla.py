# Chinchilla (Hoffmann et al. 2022), with 4 layers. The architecture is Gopher's (gopher.py); the paper trains
# it on more text. Relative positions are T5's biases; the original uses those of Transformer-XL.
# Use it after any training config: python train.py config/train_eca_char.py config/arch/chinchilla.py

reset("architecture")

n_layer = 4
n_head = 4
n_embd = 128

norm = "rmsnorm"
position = "relative"
bias = True
