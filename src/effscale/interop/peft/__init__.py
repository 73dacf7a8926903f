"""Load and save LoRA adapters in PEFT's folders."""
