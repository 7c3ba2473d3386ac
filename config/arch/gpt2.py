# GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), four layers of it.
# Any training config takes it: python train.py config/train_eca_char.py config/arch/gpt2.py

n_layer = 4
n_head = 4
n_embd = 128

norm = "layernorm"
norm_place = "pre"
position = "learned"
activation = "gelu_tanh"
bias = True
