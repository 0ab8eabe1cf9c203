"""Adapters of image models: kohya-ss, diffusers, FLUX, LyCORIS, cloneofsimo."""
