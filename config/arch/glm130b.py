# GLM-130B (Zeng et al. 2023), four layers of it: post-norm with a weighted stream (DeepNorm), and 16 tokens
# of prefix that see one another both ways and are not predicted: begin what it is to
# continue with a text of that length or more.
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

# what it does not have, in case the training config does
n_kv_head = 0
n_inner = 0
qk_norm = False
embd_norm = False
rope_theta = 10000.0
parallel_block = False
sliding_window = 0
tie_weights = True
logit_softcap = 0.0
