# LLaMA (Touvron et al. 2023), with 4 layers. Its weights can be exported as a LlamaForCausalLM of
# transformers.
# Use it after any training config: python train.py config/train_eca_char.py config/arch/llama.py

reset("architecture")

n_layer = 4
n_head = 4
n_embd = 128

norm = "rmsnorm"
position = "rope"
activation = "swiglu"
tie_weights = False
