# The decoder of "Attention is all you need" (Vaswani et al. 2017), with 4 layers and without cross-attention
# to an encoder. Post-norm needs a long warm-up.
# Use it after any training config: python train.py config/train_eca_char.py config/arch/vaswani.py

reset("architecture")

n_layer = 4
n_head = 4
n_embd = 128

norm_place = "post"
position = "sinusoidal"
activation = "relu"
bias = True
