"""What did a LoRA adapter learn, seen from its weights?

The public names below are loaded on first use: ``import lora_analysis`` alone imports neither
numpy nor torch.
"""
