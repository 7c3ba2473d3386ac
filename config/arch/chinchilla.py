# Chinchilla (Hoffmann et al. 2022), four layers of it: Gopher's architecture, trained on more text.
# Its relative positions are T5's here; the original has those of Transformer-XL.
# Any training config takes it: python train.py config/train_eca_char.py config/arch/chinchilla.py

n_layer = 4
n_head = 4
n_embd = 128

norm = "rmsnorm"
norm_place = "pre"
position = "relative"
activation = "gelu"
bias = True
