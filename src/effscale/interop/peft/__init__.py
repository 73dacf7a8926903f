"""LoRA adapters from and to PEFT's folders."""
