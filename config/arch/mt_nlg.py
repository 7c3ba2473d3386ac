# Megatron-Turing NLG 530B (Smith et al. 2022), with 4 layers: a GPT-3-like decoder with learned positions,
# layer normalization before each sublayer, and GELU. The original has 105 layers, 128 heads and a width of
# 20480.
# Use it after any training config: python train.py config/train_eca_char.py config/arch/mt_nlg.py

reset("architecture")

n_layer = 4
n_head = 4
n_embd = 128

bias = True
