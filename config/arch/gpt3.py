# GPT-3 (Brown et al. 2020), with 4 layers. The same settings as gpt2.py: all layers use dense attention. In
# the original every other layer uses sparse attention, which only pays off at much longer contexts.
# Use it after any training config: python train.py config/train_eca_char.py config/arch/gpt3.py

reset("architecture")

n_layer = 4
n_head = 4
n_embd = 128

activation = "gelu_tanh"
bias = True
