"""Fine-tuning of a pretrained model to tell classes."""
