# PaLM (Chowdhery et al. 2022), four layers of it: attention and MLP side by side, and one head of keys
# and values for all queries.
# Any training config takes it: python train.py config/train_eca_char.py config/arch/palm.py

n_layer = 4
n_head = 4
n_embd = 128

norm = "layernorm"
norm_place = "pre"
parallel_block = True
n_kv_head = 1
position = "rope"
activation = "swiglu"
bias = False

# what it does not have, in case the training config does
n_inner = 0
qk_norm = False
embd_norm = False
rope_theta = 10000.0
prefix_len = 0
sliding_window = 0
tie_weights = True
logit_softcap = 0.0
