# PaLM (Chowdhery et al. 2022), with 4 layers: attention and MLP in parallel, and multi-query attention (one
# key and value head).
# Use it after any training config: python train.py config/train_eca_char.py config/arch/palm.py

reset("architecture")

n_layer = 4
n_head = 4
n_embd = 128

parallel_block = True
n_kv_head = 1
position = "rope"
activation = "swiglu"
