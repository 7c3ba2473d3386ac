# LaMDA (Thoppilan et al. 2022), with 4 layers.
# Use it after any training config: python train.py config/train_eca_char.py config/arch/lamda.py

reset("architecture")

n_layer = 4
n_head = 4
n_embd = 128

position = "relative"
activation = "geglu"
bias = True
