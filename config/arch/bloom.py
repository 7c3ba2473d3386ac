# BLOOM (BigScience Workshop 2022), with 4 layers. It also normalizes the token embeddings.
# Use it after any training config: python train.py config/train_eca_char.py config/arch/bloom.py

reset("architecture")

n_layer = 4
n_head = 4
n_embd = 128

embd_norm = True
position = "alibi"
activation = "gelu_tanh"
bias = True
