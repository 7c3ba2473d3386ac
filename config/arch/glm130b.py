# GLM-130B (Zeng et al. 2023), four layers of it: post-norm with a weighted stream (DeepNorm), and 16 tokens
# of prefix that see one another both ways and are not predicted.
# Any training config takes it: python train.py config/train_eca_char.py config/arch/glm130b.py

n_layer = 4
n_head = 4
n_embd = 128

norm = "layernorm"
norm_place = "deepnorm"
prefix_len = 16
position = "rope"
activation = "geglu"
bias = True
