# GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), with 4 layers.
# Use it after any training config: python train.py config/train_eca_char.py config/arch/gpt2.py

reset("architecture")

n_layer = 4
n_head = 4
n_embd = 128

activation = "gelu_tanh"
bias = True
