# The decoder of "Attention is all you need" (Vaswani et al. 2017), four layers of it, without the attention
# to an encoder. Post-norm wants a long warm-up.
# Any training config takes it: python train.py config/train_eca_char.py config/arch/vaswani.py

n_layer = 4
n_head = 4
n_embd = 128

norm = "layernorm"
norm_place = "post"
position = "sinusoidal"
activation = "relu"
bias = True
