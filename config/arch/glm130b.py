# GLM-130B (Zeng et al. 2023), with 4 layers: DeepNorm (post-norm with a scaled residual) and a bidirectional
# prefix. The 16 tokens of the prefix are not predicted, so sample with a prompt of at least 16 tokens.
# Use it after any training config: python train.py config/train_eca_char.py config/arch/glm130b.py

reset("architecture")

n_layer = 4
n_head = 4
n_embd = 128

norm_place = "deepnorm"
prefix_len = 16
position = "rope"
activation = "geglu"
bias = True
