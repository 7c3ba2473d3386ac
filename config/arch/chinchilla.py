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

# what it does not have, in case the training config does
n_kv_head = 0
n_inner = 0
qk_norm = False
embd_norm = False
rope_theta = 10000.0
parallel_block = False
prefix_len = 0
sliding_window = 0
tie_weights = True
logit_softcap = 0.0
