# LLaMA (Touvron et al. 2023), four layers of it. Exports to transformers as a LlamaForCausalLM.
# Any training config takes it: python train.py config/train_eca_char.py config/arch/llama.py

n_layer = 4
n_head = 4
n_embd = 128

norm = "rmsnorm"
norm_place = "pre"
position = "rope"
activation = "swiglu"
bias = False
tie_weights = False
