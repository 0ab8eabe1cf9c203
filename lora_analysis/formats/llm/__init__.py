"""Adapters of trainers of language models: torchtune, litgpt, NeMo, AdapterHub, OpenDelta."""
