"""Fine-tuning of a pretrained model as a classifier."""
