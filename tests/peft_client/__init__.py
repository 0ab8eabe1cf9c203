"""PEFT's own tests as a client: every folder that they save is read and compared with PEFT.

``python -m peft_client PATH/TO/peft/tests`` (in ``tests/``; ``make test-peft``) runs those of
PEFT's tests that save adapters. After each ``PeftModel.save_pretrained``, reading the folder must
give the update of every live layer, or refuse it with one of our errors.
"""
