# LaMDA (Thoppilan et al. 2022), four layers of it.
# Any training config takes it: python train.py config/train_eca_char.py config/arch/lamda.py

n_layer = 4
n_head = 4
n_embd = 128

norm = "layernorm"
norm_place = "pre"
position = "relative"
activation = "geglu"
bias = True
