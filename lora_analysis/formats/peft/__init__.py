"""PEFT's adapters: folders, framework dumps, and the writer."""
