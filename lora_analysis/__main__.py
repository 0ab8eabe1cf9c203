"""``python -m lora_analysis`` is ``lora-analysis``."""

from lora_analysis.cli import main

if __name__ == "__main__":
    main()
