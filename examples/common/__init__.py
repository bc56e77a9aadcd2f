"""What the training scripts share: data, models, metrics, figures and the training loop."""
