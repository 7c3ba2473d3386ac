# GLM-130B (Zeng et al. 2023), four layers of it: post-norm with a weighted stream (DeepNorm), and a quarter
# of the block as a prefix that sees itself both ways and is not predicted.
# Any training config takes it: python train.py config/train_eca_char.py config/arch/glm130b.py

n_layer = 4
n_head = 4
n_embd = 128

norm = "layernorm"
norm_place = "deepnorm"
prefix_len = block_size // 4
position = "rope"
activation = "geglu"
bias = True
